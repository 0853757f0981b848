// stories.c: the default training data, made on the spot: stories from a grammar whose entropy is known.
//
//     cc -O2 -o stories data/stories.c -lm && ./stories --print 3 && ./stories --out data/stories
//
// A language model's loss can never go below the entropy of its text, and of real text nobody knows it. Here
// we do: a story is a chain of random choices, each made with a known probability. If every choice shows in
// the very next token, then
//     p(token | story so far) = product of the choices made since the last token
// and -ln p of the validation tokens, averaged, is the floor: the loss of a perfect model.
//
// "Shows in the very next token" is the one rule to keep when you write a grammar of your own: at each choice
// the alternatives begin with different tokens (the grammar is LL(1)). dev/test_stories.c recomputes every p
// from the text alone, by summing over all derivations, and fails where the rule is broken.
//
// From the same grammar come two sets for the stages after pre-training, of stories that it does not hold: questions
// about a story, each with one right answer (--stage sft), and pairs of endings, of which one keeps to the facts of the
// story and one does not (--stage dpo). Which answer is right and which ending is wrong is known, as the floor is.
//
// The file in order: the words, the grammar, the questions, reading them, the storyteller, documents with questions
// and pairs, rows, the files, main.
// The bytes of every file written here are described in data/README.md.

#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

// ---------------------------------------------------------------------------------------------------------
// The words. A class is a list to draw from: `word*3` is three times as likely, `_` stands for a space inside
// a word, @name includes another class. The feature decides how other words agree with it, see `forms`.

typedef struct ClassText { const char *name, *feature, *words; } ClassText;

static const ClassText class_texts[] = {
    {"girl", "f", "Lily*2 Anna*2 Mia Rosa Clara Molly Ruby Sophie"},
    {"boy", "m", "Tom*2 Ben*2 Max Leo Sam Finn Hugo Milo"},
    {"name", "", "@girl @boy"},
    {"woman", "f", "mother*2 grandmother aunt sister"},
    {"man", "m", "father*2 grandfather uncle brother"},
    {"kin", "", "@woman @man"},
    {"animal", "", "rabbit*2 fox*2 bear mouse duck frog squirrel kitten puppy goat turtle"},
    {"bugs", "", "beetles spiders ants worms moths"},
    {"being", "", "dragon giant witch king queen fairy wizard princess knight pirate"},
    {"job", "", "farmer baker miller teacher doctor sailor gardener painter tailor cobbler"},
    {"colour", "", "red*2 blue*2 green yellow white black purple golden"},
    {"garment", "", "hat*2 scarf*2 coat cap sweater shawl"},
    {"toy", "", "ball kite doll drum train robot balloon book"},
    {"treasure", "", "ring lamp crown key shell coin pearl"},
    {"ware", "", "cup*2 ribbon brush pan blanket button plate"},
    {"craft", "", "boat*2 house*2 cart bridge raft sled tower swing"},
    {"material", "", "wood*2 paper*2 cloth clay straw bricks wool"},
    {"tool", "", "hammer*2 saw ladder knife shovel"},
    {"bits", "", "nails*2 string glue rope tape"},
    {"instrument", "", "flute*2 trumpet*2 violin guitar piano harp"},
    {"food", "", "bread cheese honey soup butter jam apples pears cherries carrots"},
    {"drink", "", "tea juice cocoa cream"},
    {"tasty", "", "delicious wonderful sweet perfect"},
    {"vessel", "", "jar bag bowl sack"},
    {"indoors", "in", "garden*2 forest*2 park meadow barn valley castle"},
    {"waterside", "by", "river*2 lake*2 pond sea road mill"},
    {"upland", "on", "hill*2 farm*2 beach island"},
    {"under", "under", "bed*2 table*2 chair stairs carpet"},
    {"inside", "in", "box*2 drawer basket bucket cupboard boot"},
    {"behind", "behind", "door*2 curtain clock sofa stove"},
    {"place", "", "@indoors @waterside @upland"},
    {"spot", "", "@under @inside @behind"},
    {"landmark", "", "tree*2 rock*2 bush log fence gate well bench"},
    {"rag", "", "sock shoe spoon glove bottle"},
    {"crumbs", "", "dust sand leaves crumbs"},
    {"limb", "", "knee foot arm nose"},
    {"trait", "",
     "little*2 kind brave clever gentle quiet funny curious shy busy polite careful dreamy cheeky"},
    {"size", "", "big small tiny huge strange round heavy pretty"},
    {"shiny", "", "shiny smooth warm beautiful"},
    {"sad", "", "sad*2 worried lonely gloomy tired"},
    {"happy", "", "happy*2 glad proud cheerful merry"},
    {"weather", "", "sunny*2 rainy*2 windy cloudy snowy foggy cold"},
    {"daypart", "", "morning*2 afternoon evening"},
    {"weekday", "", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"},
    {"number", "", "three four five six seven eight nine"},
    {"season", "", "spring summer autumn winter"},
    {"flower", "", "roses tulips daisies lilies poppies"},
    {"hobby", "", "sing*2 dance*2 read swim climb draw paint cook fish run"},
    {"game", "", "football cards marbles chess pirates"},
    {"chore", "",
     "wash_the_windows feed_the_hens sweep_the_floor count_the_sheep water_the_flowers mend_the_roof"},
    {"secret", "", "pumpkin rainbow butterfly cucumber moonlight bumblebee"},
    {"noise", "", "thunder lightning dark wind"},
    {"howl", "", "howl roar moan"},
    {"ran", "", "ran*2 walked hurried raced skipped"},
    {"said", "", "said*4 cried whispered called muttered shouted"},
    {"asked", "", "asked*3 wondered"},
    {"hugged", "", "hugged thanked kissed"},
    {"smile", "", "smile grin giggle wink"},
    {"softly", "", "softly quietly loudly sweetly kindly bravely"},
    {"slowly", "", "slowly quickly carefully happily"},
};

// {hero.his} is the form "his" of the word that hero is bound to. Column 1 is that word's feature.
static const struct { const char *feature, *form, *text; } forms[] = {
    {"f", "he", " she"}, {"f", "He", " She"},
    {"f", "his", " her"}, {"f", "His", " Her"}, {"f", "him", " her"},
    {"m", "he", " he"},  {"m", "He", " He"},
    {"m", "his", " his"}, {"m", "His", " His"}, {"m", "him", " him"},
    {"in", "at", " in"}, {"by", "at", " by"}, {"on", "at", " on"},
    {"under", "at", " under"}, {"behind", "at", " behind"},
};

// ---------------------------------------------------------------------------------------------------------
// The grammar. Rows with the same name are the alternatives of one rule, with their weights. In the text:
//     <class>        a word drawn from the class and forgotten
//     {var=class}    a word drawn and remembered as var; words that the story remembers already are left out
//     {var} {var.form}   the remembered word, or a form of it: certain, if the reader has paid attention
//     [rule] [rule var]  another rule; inside it {$...} means var
//     `              a double quote
// The space before < and { belongs to the word; a rule brings its own. An empty alternative shows in the next
// token.

typedef struct GrammarText { const char *rule; int weight; const char *text; } GrammarText;

static const GrammarText grammar_texts[] = {
    {"story", 1, "[opening][home][clothes][family][when], {hero}[plot][end]"},

    {"opening", 5, "Once upon a time there was a <trait>[who hero]."},
    {"opening", 2, "There once lived a <trait>[who hero]."},
    {"opening", 2, "In a <size> house lived a <trait>[who hero]."},
    {"opening", 2, "Long ago there was a {t=trait} and {u=trait}[who hero]."},
    {"who", 4, " girl named {$=girl}"},
    {"who", 4, " boy named {$=boy}"},
    {"who", 3, " <animal> named {$=name}"},
    {"home", 3, " {hero.He} lived[place home] and loved to {hobby=hobby}."},
    {"home", 2, " {hero} lived[place home] and liked nothing better than to {hobby=hobby}."},
    {"home", 2, " Every <daypart> {hero.he} went out to {hobby=hobby}[place home]."},
    {"clothes", 3, " {hero.He} always wore a {cc=colour} {cloth=garment}."},
    {"clothes", 3, " Everyone knew {hero.his} {cc=colour} {cloth=garment}."},
    {"clothes", 2, " {hero.His} <kin> had made {hero.him} a {cc=colour} {cloth=garment}."},
    {"family", 2, ""},
    {"family", 2, " {hero.His} <kin> was a <trait> <job>."},
    {"family", 2, " {hero.He} had <number> <bugs> and a <size> <animal>."},
    {"when", 4, " One <weather> <daypart>"},
    {"when", 2, " On a <weather> <weekday>"},
    {"when", 2, " Last <weekday>"},
    {"when", 2, " After some <food> and <drink> for breakfast"},

    {"plot", 1, "[lost]"},   {"plot", 1, "[gift]"},  {"plot", 1, "[errand]"}, {"plot", 1, "[hungry]"},
    {"plot", 1, "[race]"},   {"plot", 1, "[storm]"}, {"plot", 1, "[build]"},  {"plot", 1, "[bake]"},
    {"plot", 1, "[wish]"},   {"plot", 1, "[seeds]"}, {"plot", 1, "[secret]"}, {"plot", 1, "[concert]"},

    {"end", 3, ""},
    {"end", 2, " The end."},
    {"end", 2, " That night {hero} slept well in the house {home.at} the {home}."},
    {"end", 2, " Then {hero} put on the {cc} {cloth} and went out to {hobby}."},
    {"end", 2, " If you ever see a {cc} {cloth} {home.at} the {home}, say hello to {hero}."},

    // parts that many plots share
    {"spot", 3, " under the {$=under}"},
    {"spot", 4, " in the {$=inside}"},
    {"spot", 3, " behind the {$=behind}"},
    {"place", 4, " in the {$=indoors}"},
    {"place", 3, " by the {$=waterside}"},
    {"place", 2, " on the {$=upland}"},
    {"junk", 3, " a sleeping <animal>"},
    {"junk", 3, " an old <colour> <rag>"},
    {"junk", 2, " some <crumbs>"},
    {"junk", 2, " <number> <bugs>"},
    {"tone", 4, ""},
    {"tone", 2, " <softly>"},
    {"tone", 2, " with a <smile>"},
    {"aside", 3, ""},
    {"aside", 2, " Nearby a <size> <animal> sang <softly>."},
    {"aside", 2, " Far away, <number> <bugs> were dancing."},
    {"aside", 2, " Outside it was <weather>."},
    {"sigh", 2, " How <sad> {hero.he} was!"},
    {"sigh", 3, ""},
    {"thanks", 3, " `Thank you, {friend}!` <said> {hero}[tone]."},
    {"thanks", 2, " {hero} <hugged> {friend} and danced with joy."},
    {"thanks", 2, " Both friends laughed for <number> minutes."},
    {"pastime", 3, " They told stories about a <trait> <being> and a <size> <animal>."},
    {"pastime", 2, " Together they built a <size> tower out of <material> and <material>."},
    {"pastime", 2, " For <number> hours they played <game>."},
    {"pastime", 3, " {friend} drew a <colour> <animal>, and {hero} drew a <colour> <being>."},

    {"lost", 1, " could not find {hero.his} {c=colour} {x=toy}. `Where is my {x}?` {hero.he} <asked>.[sigh]"
                " {hero.He} looked[spot a], but found only[junk].[again][aside][helper]"
                " `You played[place p] on <weekday>,` {friend.he} <said>[tone]. They <ran> to the {p}."
                " There, next to a <size> <landmark>, was the {c} {x}![thanks]"
                " From then on, {hero} always kept the {c} {x}[spot d]."},
    {"again", 3, " Then {hero.he} looked[spot b] and found[junk]."},
    {"again", 2, " It was not[spot b] either."},
    {"again", 2, ""},
    {"helper", 3, " Just then {hero.his} <trait> friend {friend=name} came by."},
    {"helper", 3, " `Do not be <sad>,` said {hero.his} friend {friend=name}."},

    {"gift", 1, " bought a {c=colour} {x=toy} for {hero.his} friend {friend=name}."
                " It was a surprise, so {hero.he} hid it[spot a].[visit]"
                " `What are you hiding?` <asked> {friend}[tone]. `Nothing at all,` <said>"
                " {hero}[tone].[pastime][aside]"
                " At last {hero} said, `Close your eyes, {friend}.` {hero.He} looked {a.at} the {a}."
                "[surprise] `A {c} {x}, and it is for me!` <said> {friend}. {friend.He} was so <happy> that"
                " {friend.he}[rejoice]."},
    {"visit", 3, " Soon {friend} came to play."},
    {"visit", 2, " In the <daypart> {friend} knocked <number> times at the door."},
    {"surprise", 6, " The {x} was still there."},
    {"surprise", 4, " But the {x} was gone! `I put it[spot b],` <said> {hero.his} <kin>. And there it was."},
    {"rejoice", 3, " kept the {c} {x}[spot d] for ever"},
    {"rejoice", 2, " showed the {c} {x} to the <job>"},
    {"rejoice", 2, " <hugged> {hero} <number> times"},

    {"errand", 1, " had to go to the market."
                  " `Please bring me some {f=food}, some {g=food} and a {c=colour} {x=ware},` said {hero.his}"
                  " {kin=kin}[tone]."
                  " On the way {hero.he} met a <trait> {pal=animal}. `Come and play <game> with me,` <said>"
                  " the {pal}.[play][aside]"
                  " Suddenly {hero} stopped. `Oh no! What did I have to buy?`[think]"
                  " `I know it,` {hero.he} <said>[tone]. `Some {f}, some {g} and a {c} {x}!`"
                  " The <trait> <job> put everything into a <size> <vessel>.[basket]"
                  " `You did not forget anything!` <said> {hero.his} {kin}[tone]."},
    {"play", 3, " So they played next to a <size> <landmark>."},
    {"play", 2, " {hero} forgot the market and played for <number> hours."},
    {"play", 2, " What fun they had!"},
    {"think", 3, " {hero.He} sat down next to a <landmark> and tried to remember."},
    {"think", 2, " `Think of your {kin},` <said> the {pal}."},
    {"think", 2, " The {pal} could not help."},
    {"basket", 3, " {hero.He} <ran> home with the {f}, the {g} and the {c} {x}."},
    {"basket", 2, " That evening there was {g} with {f} for dinner, and the {c} {x} was on the table."},

    {"hungry", 1, " met a {s=sad} {pal=animal}[place p]. `Why are you crying?` <asked> {hero}[tone]."
                  " `I am hungry, and I only like {f=food},` <said> the {pal}[tone].[offer] So {hero} <ran>"
                  " to the {job=job}."
                  " `I will give you {f} if you {chore=chore},` said the {job}.[work][aside]"
                  " Then the {job} gave {hero.him} a <size> <vessel> of {f}. {hero} <ran> back to the {p}."
                  " The {pal} ate the {f} <slowly> and was not {s} any more."
                  " `Take my {c=colour} {x=treasure},` <said> the {pal}[tone]. `It will bring you luck.`"
                  " To this day {hero} keeps the {c} {x}[spot a]."},
    {"offer", 3, " At home there was only some {y=food} with <drink>."},
    {"offer", 2, " `Wait next to the <landmark>,` <said> {hero}."},
    {"offer", 2, " {hero} had no {f} at home."},
    {"work", 3, " {hero} began to {chore} at once."},
    {"work", 2, " It was hard to {chore}, but {hero} did it <slowly>."},

    {"race", 1, " heard about a race[place p]. The prize was a {c=colour} {x=toy}."
                " {hero.His} <trait> friend {friend=name} the {pal=animal} wanted to win it, too."
                " `Ready, steady, go!` <said> the {job=job}[tone].[running][aside]"
                " Near the end {friend} fell over a <size> <landmark> and hurt {friend.his}"
                " {limb=limb}.[finish]"
                " That is how the race {p.at} the {p} ended."},
    {"running", 3, " {friend} was as fast as a <animal>."},
    {"running", 3, " {hero} was first, but {friend} ran faster and faster."},
    {"running", 2, " Side by side they ran past <number> <size> houses."},
    {"finish", 6, " {hero} stopped at once.[bandage] Then they <ran> to the end hand in hand."
                  " `You both win,` <said> the {job}[tone] and gave the {c} {x} to {hero} and {friend}."},
    {"finish", 4, " Nobody saw it, and {hero} won. But the {c} {x} did not make {hero.him} <happy>."
                  " So {hero.he} gave it to {friend} the {pal}, and {friend.his} {limb} did not hurt any"
                  " more."},
    {"bandage", 3, " `How is your {limb}?` {hero.he} <asked>[tone]."},
    {"bandage", 2, " {hero.He} put a <colour> bandage on {friend.his} {limb}."},

    {"storm", 1, " saw a storm coming. The wind <howl>ed and {hero.his} <trait> friend {friend=name}"
                 " hid[spot a]."
                 " `I am afraid of the {noise=noise},` <said> {friend} <softly>."
                 " {hero} lit a {c=colour} candle and told a story. `A <trait> {m=being} once lost a"
                 " {d=colour} {x=treasure}."
                 " It was not[place p] and it was not[place q]. The {m} found only[junk].[return]`"
                 " `Was the {m} <happy>?` <asked> {friend}. `Yes,` <said> {hero}[tone],"
                 " `and the {d} {x} was never lost again.`[aside] Soon the storm was over.[calm]"},
    {"return", 3, " At last a <trait> <animal> brought the {d} {x} back."},
    {"return", 2, " Then, <number> days later, the {d} {x} was[spot b]."},
    {"calm", 3, " {friend} blew out the {c} candle and was not afraid of the {noise} any more."},
    {"calm", 2, " Nobody was {a.at} the {a} now, and the {c} candle went out <slowly>."},

    {"build", 1, " began to build a <size> {x=craft} out of {m=material}."
                 " {hero.His} {kin=kin} brought {hero.him} a <colour> <tool> and some <bits>.[toil] But the"
                 " {x}[broken].[sigh]"
                 " `Do not use {m}, use {n=material},` <said> {hero.his} friend {friend=name}[tone].[aside]"
                 " So they <slowly> built the {x} again, and {friend} painted it {c=colour}.[pride]"
                 " {hero.His} {kin} came to see the {c} {x}. `It is made of {n},` <said> {hero}[tone],"
                 " `and {friend} had the idea!`"},
    {"toil", 3, " {hero.He} worked for <number> hours."},
    {"toil", 2, " All <daypart> long {hero.he} worked <slowly>."},
    {"broken", 3, " fell to pieces"},
    {"broken", 2, " was too heavy for a <animal>"},
    {"broken", 2, " broke in the wind"},
    {"pride", 3, " Now it was strong and <shiny>."},
    {"pride", 2, " What a <shiny> {x} it was!"},

    {"bake", 1, " wanted to bake a cake for {hero.his} {kin=kin}."
                " {hero.He} needed some {f=food}, some {g=food} and some {h=food}."
                " But {hero.he} could not find any[missing] {hero} <slowly> mixed the {f}, the {g} and the"
                " {h} in a <size> bowl."
                "[aside][oven] {hero.His} {kin} took a bite. `I can taste {f}, {g} and {h},` {kin.he}"
                " <said>[tone]. `It is <tasty>!`"
                " They gave the last piece to {friend}."},
    {"missing", 1, "[fetch f]"}, {"missing", 1, "[fetch g]"}, {"missing", 1, "[fetch h]"},
    {"fetch", 1, " {$}! So {hero} <ran> to {hero.his} friend {friend=name}, who lived[place p]."
                 " `May I have some {$}?` <asked> {hero}[tone]. `Yes,[bargain],` <said> {friend}[tone]."
                 " {hero} <ran> home with the {$}."},
    {"bargain", 3, " if I can have a <size> piece of cake"},
    {"bargain", 2, " because you are my friend"},
    {"bargain", 2, " but come back and play <game>"},
    {"oven", 3, " Soon the house smelled <tasty>."},
    {"oven", 2, " After <number> minutes the cake was ready."},

    {"wish", 1, " found a magic {x=treasure}[place p]. It was {c=colour} and very <shiny>."
                " When {hero.he} rubbed it, a <size> {m=being} came out. `You have three wishes,` <said> the"
                " {m}[tone]."
                " First {hero} wished for some {f=food}. Then {hero.he} wished for a {d=colour} {y=toy}."
                "[aside]"
                " But {hero.he} still felt {s=sad}.[advice]"
                " So {hero} wished for a friend, and there was a <trait>[who friend]![share] {hero} was not"
                " {s} any more."
                " The {m} went back into the {c} {x} and slept for <number> years."},
    {"advice", 3, " `You need a friend,` <said> the {m}[tone]."},
    {"advice", 2, " It is no fun to be alone."},
    {"share", 3, " Together they <slowly> ate the {f} and played with the {d} {y}."},
    {"share", 2, " {hero} gave {friend} the {d} {y}, and they ate the {f} with some <food>."},

    {"seeds", 1, " planted {n=number} seeds[place p]. Every <daypart> {hero.he} gave them water.[sprout]"
                 " Then a <size> {pal=animal} came by. `I will eat your plants,` <said> the {pal}[tone]."
                 " `Please do not,` <said> {hero}[tone]. `I will bring you some {f=food}.`"
                 " {hero} <ran> home and came back with the {f}.[guard][aside]"
                 " In {season=season} there were {n} {c=colour} {y=flower} {p.at} the {p}."
                 " {hero} gave one to {hero.his} <trait> <kin> and one to the {pal} that liked {f}."},
    {"sprout", 3, " After a week there were {n} <size> plants."},
    {"sprout", 2, " `Grow, grow, grow,` {hero.he} <said>[tone]."},
    {"sprout", 2, " They grew and grew."},
    {"guard", 3, " From that day on, the {pal} took care of the {n} plants and chased away the <bugs>."},
    {"guard", 2, " `I like you,` <said> the {pal}[tone], and ate the {f} <slowly>."},

    {"secret", 1, " discovered a tiny <colour> door[spot a]. `What is the secret word?` <asked> a"
                  " voice[tone].[guess]"
                  " Then a <trait> {pal=animal} came by. `The word is {w=secret},` <said> the"
                  " {pal}[tone].[repeat][aside]"
                  " The next <daypart> {hero} <ran> back to the door {a.at} the {a}."
                  " `The secret word is {w},` {hero.he} <said>[tone]. The door opened, and there sat a"
                  " <trait> {m=being}."
                  " `Well done,` <said> the {m}. `This {c=colour} {x=treasure} is for you.`"
                  " {hero} showed the {c} {x} to the {pal} and never told anyone the word {w}."},
    {"guess", 3, " `Is it {v=secret}?` <asked> {hero}. It was not {v}."},
    {"guess", 2, " {hero} asked {hero.his} <kin> and the <job>, but nobody knew."},
    {"repeat", 3, " {hero} said it <number> times, so as not to forget it."},
    {"repeat", 2, " `That is easy,` <said> {hero}[tone]."},

    {"concert", 1, " got a {c=colour} {i=instrument} from {hero.his} {kin=kin}."
                   " `There is a concert[place p] on {d=weekday},` {kin.he} <said>[tone]."
                   " At first the {i} sounded like a <sad> {pal=animal}.[tease] But {hero} played it every"
                   " <daypart>.[practice][aside]"
                   " On {d} everyone came to the {p}. `You can do it,` <said> {friend}[tone]."
                   " {hero} took the {c} {i} and played.[applause] `That was not a {pal},` <said> {hero.his}"
                   " {kin}[tone]."
                   " `That was the best {i} in the world!`"},
    {"tease", 3, " {hero.His} <trait> friend {friend=name} laughed."},
    {"tease", 2, " `Stop it,` <said> {hero.his} friend {friend=name}[tone]."},
    {"practice", 3, " After <number> days it got better."},
    {"practice", 2, " Even {friend} and the <job> began to like it."},
    {"applause", 3, " The <trait> <job> began to dance."},
    {"applause", 2, " How <happy> they all were!"},
    {"applause", 2, " A <trait> <being> gave {hero.him} some <flower>."},
};

// ---------------------------------------------------------------------------------------------------------
// The questions. `told` is text of the grammar: once a story has told it, and from then on, the question has
// exactly one right answer. Question and answer may recall all that is remembered; where `told` is part of a rule
// with a parameter, {$} is that rule's.
// They ask for names, beings and things only. The model of the default run is small, and learns these first; which of its
// colours, clothes, places, pursuits and foods a story means it learns much later, if at all.

typedef struct QuestionText { const char *told, *question, *answer; } QuestionText;

static const QuestionText question_texts[] = {
    // of any story
    {"[who hero]", "Who is the story about?", "The story is about {hero}."},
    {"friend {friend=name}", "Who was the friend of {hero}?", "{hero.His} friend was {friend}."},
    // lost
    {"find {hero.his} {c=colour} {x=toy}", "What could {hero} not find?", "{hero} could not find the {x}."},
    {"`You played[place p] on", "Who helped {hero}?", "{hero.His} friend {friend} helped {hero.him}."},
    // gift
    {"bought a {c=colour} {x=toy}", "What did {hero} buy?", "{hero} bought the {x}."},
    {"for {hero.his} friend {friend=name}", "Who was the {x} for?", "The {x} was for {friend}."},
    // errand
    {"and a {c=colour} {x=ware}", "What did {hero} have to buy?", "{hero} had to buy the {x}."},
    {"Come and play <game> with me", "Who wanted to play?", "The {pal} wanted to play."},
    // hungry
    {"met a {s=sad} {pal=animal}", "Who was {s}?", "The {pal} was {s}."},
    {"if you {chore=chore}", "What did {hero} have to do?", "{hero} had to {chore}."},
    {"Take my {c=colour} {x=treasure}", "What did the {pal} give to {hero}?", "The {pal} gave {hero} the {x}."},
    // race
    {"prize was a {c=colour} {x=toy}", "What was the prize?", "The prize was the {x}."},
    {"{friend=name} the {pal=animal}", "What was {friend}?", "{friend} was a {pal}."},
    {"hurt {friend.his} {limb=limb}", "What did {friend} hurt?", "{friend} hurt {friend.his} {limb}."},
    // storm
    {"afraid of the {noise=noise}", "What was {friend} afraid of?", "{friend} was afraid of the {noise}."},
    {"{m=being} once lost a {d=colour} {x=treasure}", "Who lost a {x}?", "The {m} lost a {x}."},
    {"{m=being} once lost a {d=colour} {x=treasure}", "What did the {m} lose?", "The {m} lost a {x}."},
    // build
    {"{x=craft} out of {m=material}", "What did {hero} build?", "{hero} built a {x}."},
    {"{x=craft} out of {m=material}", "What was the {x} made of at first?", "At first the {x} was made of {m}."},
    {"painted it {c=colour}", "Who painted the {x}?", "{friend} painted the {x}."},
    {"{friend} had the idea!", "Who had the idea?", "{friend} had the idea."},
    // wish
    {"magic {x=treasure}[place p]", "What did {hero} find?", "{hero} found the {x}."},
    {"{m=being} came out", "Who came out of the {x}?", "A {m} came out of the {x}."},
    {"there was a <trait>[who friend]", "Who was the friend of {hero}?", "{hero.His} friend was {friend}."},
    // seeds
    {"<size> {pal=animal} came by", "Who came by?", "A {pal} came by."},
    // secret
    {"The word is {w=secret},` <said> the {pal}", "Who knew the word?", "The {pal} knew the word."},
    {"there sat a <trait> {m=being}", "Who sat there?", "A {m} sat there."},
    {"This {c=colour} {x=treasure}", "What did the {m} give to {hero}?", "The {m} gave {hero} the {x}."},
    // concert
    {"But {hero} played it", "What did {hero} play?", "{hero} played the {i}."},
    {"friend {friend=name} laughed", "Who laughed?", "{friend} laughed."},
};

// A chat about a story: the story as the system's turn, the question as the user's, the answer as the assistant's.
// It needs no piece that the vocabulary does not have.
static const char chat_template[] =
    "<|endoftext|>{% for m in messages %}{% if m.role == 'user' %} Q: {{ m.content }}{% elif m.role == 'assistant' %}"
    " A: {{ m.content }}<|endoftext|>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} A:{% endif %}";

// ---------------------------------------------------------------------------------------------------------
// Reading the tables: the text of the grammar item by item, the classes, the vocabulary.

#define COUNT(table) ((int)(sizeof(table) / sizeof((table)[0])))

enum {
    SEQ_LEN = 256,        // T: a window has T+1 tokens, <|endoftext|> and whole stories
    EOD = 256,            // <|endoftext|>: begin and end of a document; ids below are bytes, above words
    MAX_TEXT = 32, MAX_PIECES = 1024, MAX_CLASS_WORDS = 32, MAX_VARS = 48, MAX_DEPTH = 16, MAX_WORD_TOKENS = 8,
    MAX_STORY = SEQ_LEN + 64,            // a story that fits the window, and a question with its answer
    MAX_TOLD = 512, MAX_ENDINGS = 256, MAX_FACTS = 16
};

typedef struct Word {                  // text: a space first
    char text[MAX_TEXT];
    const char *feature;
    int weight, n, tokens[MAX_WORD_TOKENS];
} Word;
typedef struct Class { int n; Word words[MAX_CLASS_WORDS]; } Class;

typedef struct Grammar {
    char pieces[MAX_PIECES][MAX_TEXT];   // piece of token id i; sorted above EOD
    int n_pieces, n_content_words;
    Class classes[COUNT(class_texts)];
    struct Ending { const char *end; int q; } endings[MAX_ENDINGS];   // where the text ends that answers question q,
    int n_endings;                                                    // in the order of the grammar
} Grammar;

// One item of a grammar text: LITERAL name; DRAW a word of class `other` as variable `name` ("" = forget it);
// RECALL variable `name` in form `other` ("" = as it is); CALL rule `name` with parameter `other` ("" = the
// caller's own).
enum { LITERAL, DRAW, RECALL, CALL };
typedef struct Item { int op; char name[MAX_TEXT], other[MAX_TEXT]; } Item;

static void die(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fprintf(stderr, "error: ");
    vfprintf(stderr, fmt, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

static int find_class(const char *name) {
    for (int i = 0; i < COUNT(class_texts); i++) if (strcmp(class_texts[i].name, name) == 0) return i;
    die("the grammar has no class '%s'", name);
    return -1;
}

static int find_rule(const char *name) {   // its first row
    for (int i = 0; i < COUNT(grammar_texts); i++) if (strcmp(grammar_texts[i].rule, name) == 0) return i;
    die("the grammar has no rule '%s'", name);
    return -1;
}

static int in_rule(int row, int first) {
    return row < COUNT(grammar_texts) && strcmp(grammar_texts[row].rule, grammar_texts[first].rule) == 0;
}

static void copy_text(char *to, const char *from, const char *end) {
    memcpy(to, from, (size_t)(end - from));
    to[end - from] = 0;
}

// Reads the item at *text and moves on; 0 at the end. A literal is a word or a mark, with a space before it.
static int next_item(const char **text, Item *item) {
    const char *p = *text;
    if (!*p) return 0;
    item->name[0] = item->other[0] = 0;
    if (*p == ' ' && (p[1] == '<' || p[1] == '{')) p++;
    if (strchr("<{[", *p)) {
        const char *inside = p + 1, *end = inside + strcspn(inside, ">}]");
        const char *mark = inside + strcspn(inside, "=. >}]");
        if (!*end || end - p > MAX_TEXT) die("the grammar has a bad bracket: %s", p);
        if (*p != '[' && p == *text) die("the grammar has no space before: %s", p);
        item->op = *p == '[' ? CALL : *p == '<' || *mark == '=' ? DRAW : RECALL;
        copy_text(*p == '<' ? item->other : item->name, inside, mark);
        if (mark < end) copy_text(item->other, mark + 1, end);
        *text = end + 1;
        return 1;
    }
    const char *word = p + (*p == ' '), *end = word;
    while (isalpha((unsigned char)*end)) end++;
    if (end == word) end++;
    if (end - p >= MAX_TEXT) die("the grammar has a word that is too long: %s", p);
    item->op = LITERAL;
    copy_text(item->name, p, end);
    if (*word == '`') item->name[word - p] = '"';
    *text = end;
    return 1;
}

// Inside a rule "$" is the variable that the caller named, its parameter.
static const char *var_of(const Item *item, const char *param) {
    return strcmp(item->name, "$") == 0 ? param : item->name;
}

static const char *param_of(const Item *item, const char *param) {
    return item->other[0] && strcmp(item->other, "$") != 0 ? item->other : param;
}

static int compare_text(const void *a, const void *b) { return strcmp((const char *)a, (const char *)b); }

// Greedy longest match, as every reader of a kind 1 tokenizer.bin does it, of a literal or a word of a class. What no
// piece begins is a byte; only questions have such words.
static int encode(const Grammar *g, const char *text, int *tokens) {
    int n = 0;
    while (*text) {
        char piece[MAX_TEXT];
        const char *words = g->pieces[EOD + 1], *found = NULL;
        size_t length = strlen(text), n_words = (size_t)(g->n_pieces - EOD - 1);
        for (; length && !found; length -= !found) {
            memcpy(piece, text, length);
            piece[length] = 0;
            found = (const char *)bsearch(piece, words, n_words, MAX_TEXT, compare_text);
        }
        if (n == MAX_WORD_TOKENS) die("a word has more than %d pieces, from '%s' on", MAX_WORD_TOKENS, text);
        tokens[n++] = found ? (int)((found - g->pieces[0]) / MAX_TEXT) : (unsigned char)*text;
        text += found ? length : 1;
    }
    return n;
}

static void add_piece(Grammar *g, const char *text) {
    for (int i = EOD + 1; i < g->n_pieces; i++) if (strcmp(g->pieces[i], text) == 0) return;
    if (g->n_pieces == MAX_PIECES) die("no room for the piece '%s'", text);
    strcpy(g->pieces[g->n_pieces++], text);
}

static void add_pieces(Grammar *g, const char *text) {
    Item item;
    while (next_item(&text, &item)) if (item.op == LITERAL) add_piece(g, item.name);
}

// Reads the words of class `from` into class c.
static void read_class(Class *c, int from) {
    char text[MAX_TEXT];
    int n_chars;
    for (const char *p = class_texts[from].words; sscanf(p, "%30s%n", text, &n_chars) == 1; p += n_chars) {
        if (text[0] == '@') { read_class(c, find_class(text + 1)); continue; }
        if (c->n == MAX_CLASS_WORDS)
            die("class %s has more than %d words", class_texts[from].name, MAX_CLASS_WORDS);
        Word *w = &c->words[c->n++];
        char *star = strchr(text, '*');
        w->weight = star ? atoi(star + 1) : 1;
        w->feature = class_texts[from].feature;
        if (star) *star = 0;
        w->text[0] = ' ';
        for (int i = 0; i == 0 || text[i - 1]; i++) w->text[i + 1] = text[i] == '_' ? ' ' : text[i];
    }
}

static int is_first_use(const Grammar *g, int c, const char *text) {
    for (int i = 0; i < c; i++)
        for (int k = 0; k < g->classes[i].n; k++)
            if (strcmp(g->classes[i].words[k].text, text) == 0) return 0;
    return 1;
}

// Sorts the pieces and takes out the words that are another word and a suffix, they become two: " look" "ed".
static void finish_pieces(Grammar *g) {
    static const char *const suffixes[] = {"ed", "d", "s", "er", "ly"};
    int n = EOD + 1;
    for (int i = 0; i < COUNT(suffixes); i++) add_piece(g, suffixes[i]);
    qsort(g->pieces[n], (size_t)(g->n_pieces - n), MAX_TEXT, compare_text);
    for (int i = n; i < g->n_pieces; i++) {
        int is_derived = 0;
        for (int k = 0; k < COUNT(suffixes); k++) {
            size_t length = strlen(g->pieces[i]), cut = strlen(suffixes[k]), stem = length - cut;
            if (length < cut + 4 || strcmp(g->pieces[i] + stem, suffixes[k]) != 0) continue;
            for (int j = EOD + 1; j < n; j++)   // a stem sorts before its word
                is_derived |= strlen(g->pieces[j]) == stem && strncmp(g->pieces[j], g->pieces[i], stem) == 0;
        }
        if (!is_derived) memmove(g->pieces[n++], g->pieces[i], MAX_TEXT);
    }
    g->n_pieces = n;
}

// Where in the grammar a story has told what answers question q: an item of some rows ends there.
static void find_endings(Grammar *g, int q) {
    const QuestionText *t = &question_texts[q];
    const int n_before = g->n_endings;
    for (int row = 0; row < COUNT(grammar_texts); row++) {
        const char *p = grammar_texts[row].text, *found = strstr(p, t->told);
        if (!found) continue;
        const char *end = found + strlen(t->told);
        for (Item item; p < end && next_item(&p, &item);) ;
        if (p != end) die("no item of the grammar ends where '%s' does", t->told);
        if (g->n_endings == MAX_ENDINGS) die("the questions have more than %d answers", MAX_ENDINGS);
        int at = g->n_endings++;
        for (; at > 0 && g->endings[at - 1].end > end; at--) g->endings[at] = g->endings[at - 1];
        g->endings[at].end = end;
        g->endings[at].q = q;
    }
    if (g->n_endings == n_before) die("the grammar never tells '%s'", t->told);
}

static Grammar *grammar_create(void) {
    Grammar *g = (Grammar *)calloc(1, sizeof(Grammar));
    if (!g) die("out of memory");
    for (int i = 0; i < 256; i++) snprintf(g->pieces[i], MAX_TEXT, "<0x%02X>", (unsigned)i);
    strcpy(g->pieces[EOD], "<|endoftext|>");
    g->n_pieces = EOD + 1;
    for (int c = 0; c < COUNT(class_texts); c++) {
        read_class(&g->classes[c], c);
        for (int k = 0; k < g->classes[c].n; k++) {
            g->n_content_words += is_first_use(g, c, g->classes[c].words[k].text);
            add_pieces(g, g->classes[c].words[k].text);
        }
    }
    for (int i = 0; i < COUNT(forms); i++) add_pieces(g, forms[i].text);
    for (int i = 0; i < COUNT(grammar_texts); i++) add_pieces(g, grammar_texts[i].text);
    finish_pieces(g);
    for (int c = 0; c < COUNT(class_texts); c++)
        for (int k = 0; k < g->classes[c].n; k++)
            g->classes[c].words[k].n = encode(g, g->classes[c].words[k].text, g->classes[c].words[k].tokens);
    for (int q = 0; q < COUNT(question_texts); q++) find_endings(g, q);
    return g;
}

// The longest word, in tokens, that each variable may hold.
typedef struct Longest { char vars[MAX_VARS][MAX_TEXT]; int n[MAX_VARS]; } Longest;

static int *longest_of(Longest *l, const char *var) {
    int v = 0;
    while (l->vars[v][0] && strcmp(l->vars[v], var) != 0) v++;
    if (v == MAX_VARS - 1) die("the grammar has more than %d variables", MAX_VARS - 1);
    strcpy(l->vars[v], var);
    return &l->n[v];
}

static int longest_word(const Grammar *g, const Class *c) {
    int best = 0, tokens[MAX_WORD_TOKENS];
    for (int k = 0; k < c->n; k++) {
        int n = encode(g, c->words[k].text, tokens);
        if (n > best) best = n;
    }
    return best;
}

// The most tokens that `rule` can give: no story may be cut by chance, or its probabilities would be wrong.
// What a variable may hold is known when the whole grammar has been walked once, so the caller asks twice.
static int longest_text(const Grammar *g, const char *rule, const char *param, Longest *l, int depth) {
    int best = 0, tokens[MAX_WORD_TOKENS], first = find_rule(rule);
    if (depth == MAX_DEPTH) die("the rule %s calls itself", rule);
    for (int row = first; in_rule(row, first); row++) {
        const char *text = grammar_texts[row].text;
        int total = 0, n = 0;
        for (Item item; next_item(&text, &item); total += n) {
            if (item.op == LITERAL) n = encode(g, item.name, tokens);
            if (item.op == CALL) n = longest_text(g, item.name, param_of(&item, param), l, depth + 1);
            if (item.op == RECALL) n = *longest_of(l, var_of(&item, param));
            if (item.op == DRAW) {
                n = longest_word(g, &g->classes[find_class(item.other)]);
                int *longest = longest_of(l, var_of(&item, param));
                if (item.name[0] && n > *longest) *longest = n;
            }
        }
        if (total > best) best = total;
    }
    return best;
}

static int longest_story(const Grammar *g) {   // with its <|endoftext|>
    Longest l;
    memset(&l, 0, sizeof l);
    longest_text(g, "story", "", &l, 0);
    return longest_text(g, "story", "", &l, 0) + 1;
}

// ---------------------------------------------------------------------------------------------------------
// The storyteller. It walks down the grammar; p collects the probability of the choices made since the last
// token.

typedef struct Story {
    const Grammar *g;
    uint64_t rng;
    double p;
    int n, n_vars;
    struct {                           // what the story remembers, and after how many tokens it was drawn
        char name[MAX_TEXT];
        const Word *word;
        const Class *from;
        int n;
    } vars[MAX_VARS];
    struct { const char *end; char param[MAX_TEXT]; int n; } told[MAX_TOLD];   // each item: its end in the grammar,
    int n_told;                                                                // the tokens once it was told
    uint16_t tokens[MAX_STORY];
    float nll[MAX_STORY];              // -ln p(tokens[i] | the story before it)
    uint8_t recalls[MAX_STORY];        // 1 + v: here begins the word of vars[v], as it is; 0 elsewhere
} Story;

static uint64_t splitmix64(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

// 0 .. n-1 with equal probability, to within 2^-32.
static int random_below(Story *s, int n) { return (int)((splitmix64(&s->rng) >> 32) * (uint64_t)n >> 32); }

static void tell_token(Story *s, int token) {
    if (s->n == MAX_STORY) die("a story with its question is longer than %d tokens", MAX_STORY);
    s->tokens[s->n] = (uint16_t)token;
    s->recalls[s->n] = 0;
    s->nll[s->n++] = s->p == 1 ? 0.0f : (float)-log(s->p);
    s->p = 1;
}

static void tell_text(Story *s, const char *text) {
    int tokens[MAX_WORD_TOKENS], n = encode(s->g, text, tokens);
    for (int i = 0; i < n; i++) tell_token(s, tokens[i]);
}

static void tell_word(Story *s, const Word *w) { for (int i = 0; i < w->n; i++) tell_token(s, w->tokens[i]); }

static int is_remembered(const Story *s, const Word *w) {
    for (int v = 0; v < s->n_vars; v++) if (strcmp(s->vars[v].word->text, w->text) == 0) return 1;
    return 0;
}

static void tell_draw(Story *s, const Class *c, const char *var) {
    const Word *left_to_draw[MAX_CLASS_WORDS];
    int n = 0, total = 0, i = 0;
    for (int k = 0; k < c->n; k++) {
        if (var[0] && is_remembered(s, &c->words[k])) continue;
        left_to_draw[n++] = &c->words[k];
        total += c->words[k].weight;
    }
    if (total == 0) die("the grammar draws {%s} from a class without words left", var);
    int x = random_below(s, total);
    for (; x >= left_to_draw[i]->weight; i++) x -= left_to_draw[i]->weight;
    s->p *= (double)left_to_draw[i]->weight / total;
    tell_word(s, left_to_draw[i]);
    if (!var[0]) return;
    if (s->n_vars == MAX_VARS) die("the grammar has more than %d variables", MAX_VARS);
    strcpy(s->vars[s->n_vars].name, var);
    s->vars[s->n_vars].word = left_to_draw[i];
    s->vars[s->n_vars].from = c;
    s->vars[s->n_vars++].n = s->n;
}

static void tell_recall(Story *s, const char *var, const char *form) {
    const Word *w = NULL;
    int at = s->n, v_of = 0;
    for (int v = 0; v < s->n_vars; v++)
        if (strcmp(s->vars[v].name, var) == 0) { v_of = v; w = s->vars[v].word; }
    if (!w) die("the grammar recalls {%s} before it is drawn", var);
    if (!form[0]) {
        tell_word(s, w);
        s->recalls[at] = (uint8_t)(1 + v_of);
        return;
    }
    for (int i = 0; i < COUNT(forms); i++) {
        if (strcmp(forms[i].form, form) != 0 || strcmp(forms[i].feature, w->feature) != 0) continue;
        tell_text(s, forms[i].text);
        return;
    }
    die("the grammar has no form '%s' of '%s'", form, w->text);
}

static void tell_rule(Story *s, const char *rule, const char *param);

static void tell_item(Story *s, const Item *item, const char *param) {
    if (item->op == LITERAL) tell_text(s, item->name);
    if (item->op == DRAW) tell_draw(s, &s->g->classes[find_class(item->other)], var_of(item, param));
    if (item->op == RECALL) tell_recall(s, var_of(item, param), item->other);
    if (item->op == CALL) tell_rule(s, item->name, param_of(item, param));
}

static void tell_items(Story *s, const char *text, const char *param) {
    for (Item item; next_item(&text, &item);) {
        tell_item(s, &item, param);
        if (s->n_told == MAX_TOLD) die("a story has more than %d items", MAX_TOLD);
        s->told[s->n_told].end = text;
        s->told[s->n_told].n = s->n;
        strcpy(s->told[s->n_told++].param, param);
    }
}

static void tell_rule(Story *s, const char *rule, const char *param) {
    int row = find_rule(rule), total = 0;
    for (int i = row; in_rule(i, row); i++) total += grammar_texts[i].weight;
    int x = random_below(s, total);
    for (; x >= grammar_texts[row].weight; row++) x -= grammar_texts[row].weight;
    s->p *= (double)grammar_texts[row].weight / total;
    tell_items(s, grammar_texts[row].text, param);
}

// Story `index` of a stream, a pure function of (seed, stream, index). It ends with <|endoftext|>.
static void story_tell(Story *s, const Grammar *g, uint64_t seed, uint64_t stream, uint64_t index) {
    s->g = g;
    s->rng = seed;
    s->rng = splitmix64(&s->rng) ^ stream;
    s->rng = splitmix64(&s->rng) ^ index;
    s->n = s->n_vars = s->n_told = 0;
    s->p = 1;
    tell_rule(s, "story", "");
    tell_token(s, EOD);
}

// ---------------------------------------------------------------------------------------------------------
// Documents for the stages after pre-training: stories with a question, pairs of endings. A document begins with
// <|endoftext|>, as a story does in the rows of pre-training; each of its words is a token with flags.

static const uint32_t TARGET = 0x80000000u, START = 0x40000000u, PADDING = 0x40000000u, ID = 0x00FFFFFFu;

enum { SFT, DPO };
static const char *const stage_names[] = {"sft", "dpo"};

typedef struct Unit { int64_t at; int n, n_answers; } Unit;         // what lies in one row: a document or a pair
typedef struct Answer { int question, n; uint16_t facts[MAX_FACTS]; } Answer;   // the tokens that the question does not hold
typedef struct Set {
    int stage, n, room, n_dropped;      // dropped: training units that begin as one of validation does
    Unit *units;
    uint32_t *words;                    // of unit u: words[units[u].at], .n of them
    Answer *answers;
    int n_answers, answers_room;
    unsigned char *openings;            // the first words of each unit, sorted
    int64_t n_words, words_room;
} Set;

enum {
    ROW = SEQ_LEN + 1,
    OPENING = 24,          // every document tells at least so many tokens: two that agree in them are one story
    OPENING_BYTES = (1 + OPENING) * 4,
    MOST_QUESTIONS = 10,   // of a training document; those of validation have one
    MOST_SENTENCES = 3,    // of an ending
    MOST_FACTS = 3         // changed in an ending
};

static void set_word(Set *set, int token, uint32_t flags) {
    if (set->n_words == set->words_room) {
        set->words_room = set->words_room ? 2 * set->words_room : 65536;
        set->words = (uint32_t *)realloc(set->words, (size_t)set->words_room * 4);
        if (!set->words) die("out of memory");
    }
    set->words[set->n_words++] = (uint32_t)token | flags;
}

static void set_unit(Set *set) {   // a new one, of no words yet
    if (set->n == set->room) {
        set->room = set->room ? 2 * set->room : 1024;
        set->units = (Unit *)realloc(set->units, (size_t)set->room * sizeof(Unit));
        if (!set->units) die("out of memory");
    }
    const Unit u = {set->n_words, 0, 0};
    set->units[set->n++] = u;
}

static void set_answer(Set *set, const Answer *a) {
    if (set->n_answers == set->answers_room) {
        set->answers_room = set->answers_room ? 2 * set->answers_room : 1024;
        set->answers = (Answer *)realloc(set->answers, (size_t)set->answers_room * sizeof(Answer));
        if (!set->answers) die("out of memory");
    }
    set->answers[set->n_answers++] = *a;
    set->units[set->n - 1].n_answers++;
}

static void set_close(Set *set) { set->units[set->n - 1].n = (int)(set->n_words - set->units[set->n - 1].at); }

static void set_drop(Set *set) {   // the last unit
    const Unit *u = &set->units[--set->n];
    set->n_words = u->at;
    set->n_answers -= u->n_answers;
}

static void set_free(Set *set) {
    free(set->units);
    free(set->words);
    free(set->answers);
    free(set->openings);
    memset(set, 0, sizeof *set);
}

// Where sentences end, outside of what somebody says: ends[k] tokens. The next sentence begins with a capital letter
// or a quote; after `... drum?" she asked` it goes on. The end of the story is one of them.
static int sentence_ends(const Story *s, int *ends) {
    int n = 0, is_speech = 0;
    for (int i = 0; i + 1 < s->n; i++) {
        const char *last = s->g->pieces[s->tokens[i]], *next = s->g->pieces[s->tokens[i + 1]];
        is_speech ^= strchr(last, '"') != NULL;
        if (*last == '"') last = s->g->pieces[s->tokens[i - 1]];
        const int is_begin = s->tokens[i + 1] == EOD || (*next == ' ' && (isupper((unsigned char)next[1]) || next[1] == '"'));
        if (!is_speech && is_begin && strchr(".!?", *last)) ends[n++] = i + 1;
    }
    return n;
}

// One of the numbers of a rising list that lie in lo..hi, the smaller of two draws: documents that tell less of a story
// are more frequent, and fill the rows that long ones leave. -1: there is none.
static int draw_early(Story *s, const int *list, int n, int lo, int hi) {
    while (n && *list < lo) list++, n--;
    while (n && list[n - 1] > hi) n--;
    if (n == 0) return -1;
    const int a = random_below(s, n), b = random_below(s, n);
    return list[a < b ? a : b];
}

static int is_told(const Story *s, const Word *w, int n_tokens) {
    for (int i = 0, k; i + w->n <= n_tokens; i++) {
        for (k = 0; k < w->n && s->tokens[i + k] == w->tokens[k]; k++) ;
        if (k == w->n) return 1;
    }
    return 0;
}

static int holds(const char *text, const Item *recall) {   // the variable, in any form
    char brace[MAX_TEXT + 2];
    const char *p = text;
    size_t n = (size_t)snprintf(brace, sizeof brace, "{%s", recall->name);
    while ((p = strstr(p, brace)) != NULL && p[n] != '}' && p[n] != '.') p++;
    return p != NULL;
}

// Asks question q of a story that was cut after the tokens told, and answers it: the answer and <|endoftext|> are
// targets. It stays untold, 0, where the document would have more than hi words.
static int ask(Set *set, Story *s, int q, const char *param, int hi) {
    const int n = s->n, n_told = s->n_told;
    char text[128];
    const char *p = text;
    Answer a = {q, 0, {0}};
    snprintf(text, sizeof text, " Q: %s A:", question_texts[q].question);
    tell_items(s, text, param);
    const int answer = s->n;
    snprintf(text, sizeof text, " %s", question_texts[q].answer);
    for (Item item; next_item(&p, &item);) {
        const int at = s->n, is_fact = item.op == RECALL && !holds(question_texts[q].question, &item);
        tell_item(s, &item, param);
        for (int i = at; is_fact && i < s->n && a.n < MAX_FACTS; i++) a.facts[a.n++] = s->tokens[i];
    }
    tell_token(s, EOD);
    s->n_told = n_told;
    if (1 + s->n > hi) { s->n = n; return 0; }
    for (int i = n; i < s->n; i++) set_word(set, s->tokens[i], i < answer ? 0 : TARGET);
    set_answer(set, &a);
    return 1;
}

// The questions that a whole story answers, and from which item on.
typedef struct Known { int n, q[COUNT(question_texts)], told[COUNT(question_texts)]; } Known;

static void find_known(Known *known, const Story *s) {
    const Grammar *g = s->g;
    known->n = 0;
    for (int i = 0; i < s->n_told; i++) {
        int lo = 0, hi = g->n_endings;
        while (lo < hi) {
            const int middle = (lo + hi) / 2;
            if (g->endings[middle].end < s->told[i].end) lo = middle + 1; else hi = middle;
        }
        for (; lo < g->n_endings && g->endings[lo].end == s->told[i].end; lo++) {
            int is_known = 0;
            for (int k = 0; k < known->n; k++) is_known |= known->q[k] == g->endings[lo].q;
            if (is_known) continue;
            known->q[known->n] = g->endings[lo].q;
            known->told[known->n++] = i;
        }
    }
}

// A story, told so far that it answers a question drawn from all that it answers; this question, and up to most - 1
// others that it answers by then. 0 if that does not give lo to hi words. The story itself stays as it is.
static int make_chat(Set *set, Story *s, Known known, int most, int lo, int hi) {
    int ends[MAX_STORY], turns = most, pick = random_below(s, known.n);
    const int first = s->told[known.told[pick]].n, n = s->n;
    const int cut = draw_early(s, ends, sentence_ends(s, ends), first > OPENING ? first : OPENING, hi);
    uint16_t tokens[MAX_STORY];
    if (cut < 0) return 0;
    memcpy(tokens, s->tokens, sizeof tokens);
    s->n = cut;
    set_unit(set);
    set_word(set, EOD, START);
    for (int i = 0; i < cut; i++) set_word(set, s->tokens[i], 0);
    while (turns > 0) {
        const int q = known.q[pick], told = known.told[pick];
        known.q[pick] = known.q[--known.n];
        known.told[pick] = known.told[known.n];
        if (s->told[told].n <= cut) {
            if (!ask(set, s, q, s->told[told].param, hi)) break;
            turns--;
        }
        if (known.n == 0) break;
        pick = random_below(s, known.n);
    }
    set_close(set);
    const int is_made = s->n > cut && 1 + s->n >= lo;
    if (!is_made) set_drop(set);
    memcpy(s->tokens, tokens, sizeof tokens);
    s->n = n;
    return is_made;
}

// Another word of the class that vars[v] comes from, of the same form, which the story has not told so far.
static const Word *draw_other(Story *s, int v, const Word *const *changed, int n_tokens) {
    const Word *left[MAX_CLASS_WORDS], *now = s->vars[v].word;
    int n = 0;
    for (int k = 0; k < s->vars[v].from->n; k++) {
        const Word *w = &s->vars[v].from->words[k];
        int is_used = strcmp(w->feature, now->feature) != 0 || is_told(s, w, n_tokens);
        for (int u = 0; u < s->n_vars; u++) is_used |= changed[u] && strcmp(changed[u]->text, w->text) == 0;
        if (!is_used) left[n++] = w;
    }
    return n ? left[random_below(s, n)] : NULL;
}

// The beginning of a story and the one to three sentences after it, twice: as the story goes on (chosen), and with
// other words for one to three things that it had told before (rejected), all of their mentions. The sentences are
// targets. No story goes on like the rejected ones: their probability is 0. The pair has lo to hi words; 0 where nothing
// is to change, or it has not.
static int make_pair(Set *set, Story *s, int lo, int hi) {
    const Word *changed[MAX_VARS] = {NULL};
    int ends[MAX_STORY], facts[MAX_VARS], n_facts = 0, n_ends = sentence_ends(s, ends);
    const int end = draw_early(s, ends, n_ends, lo / 2 - 2, hi / 2);   // rejected may be some tokens longer or shorter
    while (n_ends && ends[n_ends - 1] >= end) n_ends--;
    const int n_before = n_ends < MOST_SENTENCES ? n_ends : MOST_SENTENCES;
    const int cut = draw_early(s, ends + n_ends - n_before, n_before, OPENING, SEQ_LEN);
    if (end < 0 || cut < 0) return 0;
    for (int v = 0; v < s->n_vars; v++) {
        int is_fact = 0;
        for (int i = cut; i < end; i++) is_fact |= s->recalls[i] == 1 + v && s->vars[v].n <= cut;
        if (is_fact) facts[n_facts++] = v;
    }
    if (n_facts == 0) return 0;
    for (int n = 1 + random_below(s, n_facts < MOST_FACTS ? n_facts : MOST_FACTS); n > 0; n--) {
        const int pick = random_below(s, n_facts), v = facts[pick];
        if (!(changed[v] = draw_other(s, v, changed, end))) return 0;
        facts[pick] = facts[--n_facts];
    }
    set_unit(set);
    set_word(set, EOD, START);
    for (int i = 0; i < end; i++) set_word(set, s->tokens[i], i < cut ? 0 : TARGET);
    set_word(set, EOD, START);
    for (int i = 0; i < end; i++) {
        const int v = s->recalls[i] - 1;
        if (i < cut || v < 0 || !changed[v]) { set_word(set, s->tokens[i], i < cut ? 0 : TARGET); continue; }
        for (int k = 0; k < changed[v]->n; k++) set_word(set, changed[v]->tokens[k], TARGET);
        i += s->vars[v].word->n - 1;
    }
    set_close(set);
    const int n = set->units[set->n - 1].n;
    if (n >= lo && n <= hi) return 1;
    set_drop(set);
    return 0;
}

static int compare_openings(const void *a, const void *b) { return memcmp(a, b, OPENING_BYTES); }

// The next unit, of such a length that rows are full: one that leaves room for another, and the one that takes that room,
// to within two words. With pairs, one of three has a row for itself: it is the one that tells most of its story.
static int make_fitting(Set *set, Story *s, int most) {
    const int turn = set->stage == SFT && most == 1 ? 1 + set->n % 2 : set->n % 3, shortest = set->stage == SFT ? 48 : 96;
    const int room = turn == 2 ? ROW - set->units[set->n - 1].n : ROW;
    const int lo = turn == 1 ? shortest : room - 2, hi = turn == 1 ? ROW - shortest : room;
    Known known;
    if (set->stage == SFT) find_known(&known, s);
    for (int tries = 0; tries < 8; tries++)
        if (set->stage == SFT ? make_chat(set, s, known, most, lo, hi) : make_pair(set, s, lo, hi)) return 1;
    return 0;
}

// n_units chats of up to `most` questions, or pairs, of one stream of stories, none of them about a story of
// held_out (or NULL).
static void make_set(Set *set, const Grammar *g, int stage, uint64_t seed, uint64_t stream, int n_units,
                     int most, const Set *held_out) {
    Story story;
    set->stage = stage;
    for (uint64_t index = 0; set->n < n_units; index++) {
        story_tell(&story, g, seed, stream, index);
        if (!make_fitting(set, &story, most)) continue;
        const uint32_t *words = set->words + set->units[set->n - 1].at;
        if (!held_out) continue;
        if (!bsearch(words, held_out->openings, (size_t)held_out->n, OPENING_BYTES, compare_openings)) continue;
        set_drop(set);
        set->n_dropped++;
    }
    set->openings = (unsigned char *)malloc((size_t)set->n * OPENING_BYTES);
    if (!set->openings) die("out of memory");
    for (int i = 0; i < set->n; i++)
        memcpy(set->openings + (size_t)i * OPENING_BYTES, set->words + set->units[i].at, OPENING_BYTES);
    qsort(set->openings, (size_t)set->n, OPENING_BYTES, compare_openings);
}

static int compare_answers(const void *a, const void *b) {
    const Answer *x = (const Answer *)a, *y = (const Answer *)b;
    const int order = strcmp(question_texts[x->question].question, question_texts[y->question].question);
    return order ? order : memcmp(x->facts, y->facts, sizeof x->facts);
}

// The share of set's questions that one answers who has not read the stories, but knows of each question which answer
// to it is the most frequent in train.
static double guess_accuracy(const Set *train, const Set *set) {
    Answer *sorted = (Answer *)malloc((size_t)train->n_answers * sizeof(Answer));
    int n_right = 0, most = 0;
    if (!sorted) die("out of memory");
    memcpy(sorted, train->answers, (size_t)train->n_answers * sizeof(Answer));
    qsort(sorted, (size_t)train->n_answers, sizeof(Answer), compare_answers);
    for (int i = 0, n = 1, guess = 0; i < train->n_answers; i++, n++) {
        const char *question = question_texts[sorted[i].question].question;
        const int is_last = i + 1 == train->n_answers;
        if (!is_last && compare_answers(&sorted[i], &sorted[i + 1]) == 0) continue;
        if (n > most) { most = n; guess = i; }
        n = 0;
        if (!is_last && strcmp(question, question_texts[sorted[i + 1].question].question) == 0) continue;
        for (int j = 0; j < set->n_answers; j++) n_right += compare_answers(&sorted[guess], &set->answers[j]) == 0;
        most = 0;
    }
    free(sorted);
    return (double)n_right / set->n_answers;
}

// ---------------------------------------------------------------------------------------------------------
// Rows of a set: best fit decreasing. The longest unit first, each into the row where it leaves least room.

typedef struct Rows { uint32_t *words; int n, most_documents; int64_t n_documents, n_targets, n_padding; } Rows;

static void pack_rows(Rows *rows, const Set *set) {
    int with_room[ROW + 1], *next = (int *)malloc((size_t)set->n * sizeof(int));   // lists of rows by the room left
    rows->words = (uint32_t *)malloc((size_t)set->n * ROW * 4);
    if (!next || !rows->words) die("out of memory");
    for (int i = 0; i <= ROW; i++) with_room[i] = -1;
    for (int length = ROW; length > 0; length--)
        for (int i = 0; i < set->n; i++) {
            const Unit *u = &set->units[i];
            if (u->n != length) continue;
            int room = length, row;
            while (room < ROW && with_room[room] < 0) room++;
            if (with_room[room] >= 0) { row = with_room[room]; with_room[room] = next[row]; }
            else {
                row = rows->n++;
                for (int t = 0; t < ROW; t++) rows->words[(int64_t)row * ROW + t] = PADDING;
            }
            memcpy(rows->words + (int64_t)row * ROW + ROW - room, set->words + u->at, (size_t)length * 4);
            next[row] = with_room[room - length];
            with_room[room - length] = row;
        }
    free(next);
    for (int row = 0; row < rows->n; row++) {
        int n_documents = 0;
        for (int t = 0; t < ROW; t++) {
            const uint32_t w = rows->words[(int64_t)row * ROW + t];
            rows->n_padding += w == PADDING;
            rows->n_targets += (w & TARGET) != 0;
            n_documents += (w & START) && w != PADDING;
        }
        rows->n_documents += n_documents;
        if (n_documents > rows->most_documents) rows->most_documents = n_documents;
    }
}

// ---------------------------------------------------------------------------------------------------------
// The files. Each is written under a temporary name and renamed; stories.json comes last, so it marks a whole
// set.

enum { TRAIN_STREAM, VAL_STREAM, PRINT_STREAM, SFT_STREAM, SFT_VAL_STREAM, DPO_STREAM, DPO_VAL_STREAM };

typedef struct File { FILE *f; char path[1024], temp[1040]; } File;

static void file_check(const File *file, int ok) {
    if (ok) return;
    int error = errno;
    remove(file->temp);
    die("cannot write %s: %s", file->path, strerror(error));
}

static void file_open(File *file, const char *dir, const char *name) {
    if (snprintf(file->path, sizeof file->path, "%s/%s", dir, name) >= (int)sizeof file->path)
        die("the path %s is too long", dir);
    snprintf(file->temp, sizeof file->temp, "%s.tmp", file->path);
    // locked until it has its name: two runs would write the same file
    const int fd = open(file->temp, O_RDWR | O_CREAT, 0666);
    if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        die("%s is being written by another run; wait for its end", file->path);
    file->f = fd < 0 || ftruncate(fd, 0) != 0 ? NULL : fdopen(fd, "wb");
    file_check(file, file->f != NULL);
}

static void file_write(File *file, const void *data, size_t n) {
    file_check(file, fwrite(data, 1, n, file->f) == n);
}

static void file_close(File *file) {
    file_check(file, fflush(file->f) == 0 && fsync(fileno(file->f)) == 0);
    file_check(file, rename(file->temp, file->path) == 0);
    fclose(file->f);
}

static void make_dirs(const char *dir) {
    char path[1024];
    if (snprintf(path, sizeof path, "%s", dir) >= (int)sizeof path) die("the path %s is too long", dir);
    for (char *p = path + 1; ; p++) {
        char c = *p;
        if (c && c != '/') continue;
        *p = 0;
        if (mkdir(path, 0777) != 0 && errno != EEXIST)
            die("cannot make the folder %s: %s", path, strerror(errno));
        if (!c) return;
        *p = c;
    }
}

// Every file is little endian, as every machine that this runs on.
typedef struct Totals {
    int64_t tokens, stories, val_rows;
    double floor;               // of the validation rows
    int longest;
    int questions, val_questions, pairs, val_pairs;
    double guess, fill;         // of the validation questions; of the set whose rows have most padding
} Totals;

// DIR/SPLIT/SPLIT_000.ds: rows of T+1 tokens: <|endoftext|>, then whole stories, the last one cut. So every
// target has its whole story in sight. Beside it the true loss of each target (.nll) and what a reader must
// know (metadata.json). Returns the mean of the true loss; adds the stories it took to *n_stories.
static double write_rows(const Grammar *g, const char *dir, const char *split, uint64_t seed, uint64_t stream,
                         int64_t n_rows, int64_t *n_stories) {
    char folder[1024], name[64], json[512];
    File rows, nll, metadata;
    Story story;
    uint64_t index = 0;
    double sum = 0;
    if (snprintf(folder, sizeof folder, "%s/%s", dir, split) >= (int)sizeof folder)
        die("the path %s is too long", dir);
    make_dirs(folder);
    snprintf(name, sizeof name, "%s_000.ds", split);
    file_open(&rows, folder, name);
    snprintf(name, sizeof name, "%s_000.nll", split);
    file_open(&nll, folder, name);
    for (int64_t r = 0; r < n_rows; r++) {
        uint16_t row[SEQ_LEN + 1] = {EOD};
        float row_nll[SEQ_LEN];
        for (int t = 0; t < SEQ_LEN;) {
            story_tell(&story, g, seed, stream, index++);
            for (int i = 0; i < story.n && t < SEQ_LEN; i++, t++) {
                row[t + 1] = story.tokens[i];
                row_nll[t] = story.nll[i];
                sum += story.nll[i];
            }
        }
        file_write(&rows, row, sizeof row);
        file_write(&nll, row_nll, sizeof row_nll);
    }
    file_close(&rows);
    file_close(&nll);
    int n = snprintf(json, sizeof json,
        "{\n  \"dataset\": \"stories\",\n  \"tokenizer\": \"tokenizer.bin\",\n  \"split\": \"%s\",\n"
        "  \"vocab_size\": %d,\n  \"sequence_length\": %d,\n  \"token_size_bytes\": 2,\n"
        "  \"eos_token_id\": %d,\n  \"total_sequences\": %lld,\n  \"total_tokens\": %lld\n}\n",
        split, g->n_pieces, SEQ_LEN, EOD, (long long)n_rows, (long long)n_rows * (SEQ_LEN + 1));
    file_open(&metadata, folder, "metadata.json");
    file_write(&metadata, json, (size_t)n);
    file_close(&metadata);
    *n_stories += (int64_t)index;
    return sum / ((double)n_rows * SEQ_LEN);
}

static void write_tokenizer(const Grammar *g, const char *dir) {
    int32_t header[8] = {20251002, 1, /*greedy longest match*/ 1, g->n_pieces, EOD, EOD, 0, 0};
    File file;
    file_open(&file, dir, "tokenizer.bin");
    file_write(&file, header, sizeof header);
    for (int i = 0; i < g->n_pieces; i++) {
        float score = i <= EOD ? -1e30f : 0.0f;
        int32_t length = (int32_t)strlen(g->pieces[i]);
        file_write(&file, &score, 4);
        file_write(&file, &length, 4);
        file_write(&file, g->pieces[i], (size_t)length);
    }
    file_close(&file);
}

// DIR/NAME.choices: each pair as a task of two choices, of which the right one is the first and the second in turn.
// What a reader must know of a document, in the order of the rows: task, choice, right choice, characters of the choice.
static void write_choices(const Grammar *g, const char *dir, const char *name, const Rows *rows) {
    File file;
    int n_documents = 0;
    file_open(&file, dir, name);
    for (const uint32_t *w = rows->words, *end = w + (int64_t)rows->n * ROW; w < end;) {
        int32_t task = n_documents / 2, gold = task % 2, choice = n_documents % 2 ? 1 - gold : gold, length = 0;
        if (*w++ == PADDING) continue;
        for (; w < end && !(*w & START); w++) length += *w & TARGET ? (int)strlen(g->pieces[*w & ID]) : 0;
        const int32_t document[4] = {task, choice, gold, length - 1};   // without the space before the first word
        file_write(&file, document, sizeof document);
        n_documents++;
    }
    file_close(&file);
}

// DIR/STAGE/PART: the rows of a set, metadata.json and tokenizer.bin; with questions the chat template, with the part
// "choices" what each document is. guess: the share of right answers without stories.
static void write_set(const Grammar *g, const char *dir, const char *part, const Set *set, double guess, Totals *totals) {
    const int is_train = strcmp(part, "train") == 0, is_choice = strcmp(part, "choices") == 0;
    char folder[1024], json[1024], more[128];
    Rows rows = {0};
    File file;
    pack_rows(&rows, set);
    const int64_t n_words = (int64_t)rows.n * ROW;
    const double fill = 1 - (double)rows.n_padding / (double)n_words;
    if (totals->fill == 0 || fill < totals->fill) totals->fill = fill;
    if (snprintf(folder, sizeof folder, "%s/%s/%s", dir, stage_names[set->stage], part) >= (int)sizeof folder)
        die("the path %s is too long", dir);
    make_dirs(folder);
    write_tokenizer(g, folder);
    file_open(&file, folder, is_train ? "train_000.ds" : "val_000.ds");
    file_write(&file, rows.words, (size_t)n_words * 4);
    file_close(&file);
    if (is_choice) write_choices(g, folder, "val_000.choices", &rows);
    if (set->stage == SFT) {
        file_open(&file, folder, "chat_template.jinja");
        file_write(&file, chat_template, strlen(chat_template));
        file_close(&file);
        snprintf(more, sizeof more, "  \"guess_accuracy\": %.4f,\n  \"template\": \"chat_template.jinja\",\n", guess);
    } else snprintf(more, sizeof more, "  \"%s\": %d,\n", is_choice ? "tasks" : "pairs", set->n);
    int n = snprintf(json, sizeof json,
        "{\n  \"dataset\": \"stories\",\n  \"tokenizer\": \"tokenizer.bin\",\n  \"split\": \"%s\",\n"
        "  \"vocab_size\": %d,\n  \"sequence_length\": %d,\n  \"token_size_bytes\": 4,\n"
        "  \"eos_token_id\": %d,\n  \"stage\": \"%s\",\n  \"documents_per_row\": %d,\n"
        "  \"total_sequences\": %d,\n  \"total_tokens\": %lld,\n  \"documents\": %lld,\n"
        "  \"document_tokens\": %lld,\n%s  \"targets\": %lld,\n  \"mask\": \"%s\",\n  \"max_length\": %d,\n"
        "  \"counts\": {\"begins as a validation story\": %d}\n}\n",
        is_train ? "train" : "validation", g->n_pieces, SEQ_LEN, EOD, is_choice ? "choice" : stage_names[set->stage],
        rows.most_documents, rows.n, (long long)n_words, (long long)rows.n_documents,
        (long long)(n_words - rows.n_padding), more, (long long)rows.n_targets,
        set->stage == SFT ? "assistant" : "completion", ROW, set->n_dropped);
    file_open(&file, folder, "metadata.json");
    file_write(&file, json, (size_t)n);
    file_close(&file);
    free(rows.words);
}

// The questions and the pairs, each with a validation set of its own, which is made first.
static void write_sets(const Grammar *g, const char *dir, uint64_t seed, Totals *totals) {
    Set train = {0}, val = {0};
    make_set(&val, g, SFT, seed, SFT_VAL_STREAM, totals->val_questions, 1, NULL);
    make_set(&train, g, SFT, seed, SFT_STREAM, totals->questions, MOST_QUESTIONS, &val);
    totals->guess = guess_accuracy(&train, &val);
    write_set(g, dir, "validation", &val, totals->guess, totals);
    write_set(g, dir, "train", &train, guess_accuracy(&train, &train), totals);
    set_free(&train);
    set_free(&val);
    make_set(&val, g, DPO, seed, DPO_VAL_STREAM, totals->val_pairs, 0, NULL);
    make_set(&train, g, DPO, seed, DPO_STREAM, totals->pairs, 0, &val);
    write_set(g, dir, "validation", &val, 0, totals);
    write_set(g, dir, "choices", &val, 0, totals);
    write_set(g, dir, "train", &train, 0, totals);
    set_free(&train);
    set_free(&val);
}

static void write_marker(const Grammar *g, const char *dir, uint64_t seed, const Totals *t) {
    char json[1024];
    File file;
    int n = snprintf(json, sizeof json,
        "{\n  \"seed\": %llu,\n  \"train_tokens\": %lld,\n  \"train_stories\": %lld,\n  \"val_rows\": %lld,\n"
        "  \"questions\": %d,\n  \"val_questions\": %d,\n  \"guess_accuracy\": %.4f,\n  \"pairs\": %d,\n"
        "  \"val_pairs\": %d,\n  \"vocab_size\": %d,\n  \"content_words\": %d,\n"
        "  \"longest_story\": %d,\n  \"floor\": %.6f,\n  \"complete\": true\n}\n", (unsigned long long)seed,
        (long long)t->tokens, (long long)t->stories, (long long)t->val_rows, t->questions, t->val_questions, t->guess,
        t->pairs, t->val_pairs, g->n_pieces,
        g->n_content_words, t->longest, t->floor);
    file_open(&file, dir, "stories.json");
    file_write(&file, json, (size_t)n);
    file_close(&file);
}

// Makes the whole set. The marker goes first and comes back last: an interrupted run is seen and made again.
static void write_stories(const Grammar *g, const char *dir, uint64_t seed, int64_t n_tokens, int64_t n_rows,
                          Totals *totals) {
    char marker[1100];
    make_dirs(dir);
    snprintf(marker, sizeof marker, "%s/stories.json", dir);
    if (remove(marker) != 0 && errno != ENOENT) die("cannot remove %s: %s", marker, strerror(errno));
    write_tokenizer(g, dir);
    int64_t val_stories = 0, train_rows = (n_tokens + SEQ_LEN - 1) / SEQ_LEN;
    totals->floor = write_rows(g, dir, "val", seed, VAL_STREAM, n_rows, &val_stories);
    totals->val_rows = n_rows;
    write_rows(g, dir, "train", seed, TRAIN_STREAM, train_rows, &totals->stories);
    totals->tokens = train_rows * SEQ_LEN;
    write_sets(g, dir, seed, totals);
    write_marker(g, dir, seed, totals);
}

// ---------------------------------------------------------------------------------------------------------
#ifndef STORIES_NO_MAIN

static const char usage[] =
    "usage: stories [--out DIR] [--train-tokens N] [--val-rows N] [--questions N] [--pairs N] [--seed S]\n"
    "       stories --print N [--stage sft|dpo] [--seed S]\n"
    "Writes to DIR (default data/stories): stories with their true loss, for training and validation;\n"
    "N chats about stories for --stage sft; N pairs of endings for --stage dpo.\n"
    "Or prints N stories, chats or pairs.\n";

static void print_story(const Story *s) {
    for (int i = 0; i < s->n - 1; i++) fputs(s->g->pieces[s->tokens[i]], stdout);
    fputs("\n\n", stdout);
}

static void print_words(const Grammar *g, const uint32_t *words, int n) {
    for (int i = 0; i < n; i++) {
        const int id = (int)(words[i] & ID);
        if (words[i] & START) continue;
        if (id < EOD) putchar(id); else fputs(g->pieces[id], stdout);
        if (id == EOD && i + 1 < n) putchar('\n');       // the next turn of a chat
    }
    putchar('\n');
}

static void print_set(const Grammar *g, const Set *set) {
    for (const Unit *u = set->units; u < set->units + set->n; u++) {
        const uint32_t *words = set->words + u->at;
        int cut = 1, second = 1;
        while (second < u->n && !(words[second] & START)) second++;
        while (!(words[cut] & TARGET)) cut++;
        if (set->stage == DPO) {
            printf("beginning:");
            print_words(g, words, cut);
            printf("chosen:");
            print_words(g, words + cut, second - cut);
            printf("rejected:");
            print_words(g, words + second + cut, u->n - second - cut);
        } else print_words(g, words, u->n);
        putchar('\n');
    }
}

static int64_t parse_int(const char *name, const char *text, int64_t lo, int64_t hi) {
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (end == text || *end || errno || value < lo || value > hi)
        die("%s wants a whole number from %lld to %lld, got '%s'", name, (long long)lo, (long long)hi, text);
    return value;
}

int main(int argc, char **argv) {
    const char *dir = "data/stories";
    int64_t n_tokens = 6000000, n_rows = 256, n_questions = 12000, n_pairs = 4000, seed = 1, n_print = 0;
    int stage = -1;
    for (int i = 1; i < argc; i += 2) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (strcmp(name, "--help") == 0) { fputs(usage, stdout); return 0; }
        if (strcmp(name, "--out") == 0 && *value) dir = value;
        else if (strcmp(name, "--train-tokens") == 0)
            n_tokens = parse_int(name, value, SEQ_LEN + 1, 1000000000);
        else if (strcmp(name, "--val-rows") == 0) n_rows = parse_int(name, value, 1, 1000000);
        else if (strcmp(name, "--questions") == 0) n_questions = parse_int(name, value, 1, 1000000);
        else if (strcmp(name, "--pairs") == 0) n_pairs = parse_int(name, value, 1, 1000000);
        else if (strcmp(name, "--stage") == 0 && strcmp(value, "sft") == 0) stage = SFT;
        else if (strcmp(name, "--stage") == 0 && strcmp(value, "dpo") == 0) stage = DPO;
        else if (strcmp(name, "--stage") == 0) die("--stage wants sft or dpo, got '%s'", value);
        else if (strcmp(name, "--seed") == 0) seed = parse_int(name, value, 0, INT64_MAX);
        else if (strcmp(name, "--print") == 0) n_print = parse_int(name, value, 1, 1000000);
        else if (strcmp(name, "--out") == 0) die("--out wants a folder");
        else die("unknown option '%s', try --help", name);
    }

    Grammar *g = grammar_create();
    Totals totals = {.longest = longest_story(g), .questions = (int)n_questions, .val_questions = 1000,
                     .pairs = (int)n_pairs, .val_pairs = 500};
    if (totals.longest > SEQ_LEN - 1)
        die("a story may take %d tokens, more than %d", totals.longest, SEQ_LEN - 1);
    if (stage >= 0 && !n_print) die("--stage says what --print N prints");
    if (stage >= 0) {
        Set set = {0};
        make_set(&set, g, stage, (uint64_t)seed, PRINT_STREAM, (int)n_print, 3, NULL);
        print_set(g, &set);
        set_free(&set);
        free(g);
        return 0;
    }
    if (n_print) {
        Story story;
        for (int64_t i = 0; i < n_print; i++) {
            story_tell(&story, g, (uint64_t)seed, PRINT_STREAM, (uint64_t)i);
            print_story(&story);
        }
        free(g);
        return 0;
    }

    write_stories(g, dir, (uint64_t)seed, n_tokens, n_rows, &totals);
    printf("stories: %s | %lld training tokens in %lld stories | %lld validation rows of %d | "
           "vocabulary %d | %d content words | floor %.4f nats per token | "
           "longest possible story %d tokens\n", dir,
           (long long)totals.tokens, (long long)totals.stories, (long long)totals.val_rows, SEQ_LEN + 1,
           g->n_pieces, g->n_content_words, totals.floor, totals.longest);
    printf("stories: %s/sft | %d training and %d validation questions | right without the stories %.1f%% || %s/dpo | %d and "
           "%d pairs | rows at least %.2f%% full\n", dir, totals.questions, totals.val_questions, 100 * totals.guess, dir,
           totals.pairs, totals.val_pairs, 100 * totals.fill);
    free(g);
    return 0;
}
#endif

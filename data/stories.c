// stories.c: the default training data, written on the spot: little stories from a grammar whose entropy is known.
//
//     cc -O2 -o stories data/stories.c -lm && ./stories --print 3 && ./stories --out data/stories
//
// A language model's loss can never go below the entropy of its text, and for real text nobody knows that number. Here we do:
// a story is a chain of random choices, each made with a known probability. If every choice shows in the very next token, then
//     p(token | story so far) = product of the choices made since the last token
// and -ln p of the validation tokens, averaged, is the floor that the loss of a perfect model would reach.
// "Shows in the very next token" is the one rule to keep when you write a grammar of your own: at each choice the alternatives
// begin with different tokens (the grammar is LL(1)). The test of this file recomputes every p from the text alone, by
// summing over all derivations, and fails where the rule is broken.
//
// The file in order: the words, the grammar, the compiler (text of the grammar -> symbols), the storyteller, the files, main.
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
#include <sys/stat.h>
#include <unistd.h>

// ----------------------------------------------------------------------------------------------------------------------------
// The words. A class is a list to draw from: `word*3` is three times as likely, `_` stands for a space inside a word, @name
// includes another class. The feature decides how other words agree with it, see `forms`.

typedef struct ClassText { const char *name, *feature, *words; } ClassText;

static const ClassText class_texts[] = {
    {"girl", "f", "Lily*2 Anna*2 Mia Rosa Clara Nina Ella Molly Ruby Wendy Zoe Sophie"},
    {"boy", "m", "Tom*2 Ben*2 Max Leo Sam Finn Oscar Hugo Jack Milo Peter Toby"},
    {"name", "", "@girl @boy"},
    {"woman", "f", "mother*2 grandmother aunt sister"},
    {"man", "m", "father*2 grandfather uncle brother"},
    {"kin", "", "@woman @man"},
    {"animal", "", "rabbit*2 fox*2 bear mouse duck frog squirrel hedgehog kitten puppy lamb pony goat turtle pig badger"},
    {"bugs", "", "beetles spiders ants worms moths"},
    {"being", "", "dragon giant witch king queen fairy wizard princess knight pirate"},
    {"job", "", "farmer baker miller teacher doctor sailor gardener painter tailor cobbler"},
    {"colour", "", "red*2 blue*2 green yellow white black purple pink golden silver brown grey striped"},
    {"garment", "", "hat*2 scarf*2 coat cap sweater shawl"},
    {"toy", "", "ball kite doll drum train whistle robot bell balloon puppet book puzzle"},
    {"treasure", "", "ring lamp crown key stone shell feather coin mirror pearl"},
    {"ware", "", "cup*2 ribbon brush pan blanket button plate"},
    {"craft", "", "boat*2 house*2 cart bridge raft sled tower swing"},
    {"material", "", "wood*2 paper*2 cloth clay straw bricks wool"},
    {"tool", "", "hammer*2 saw ladder knife shovel"},
    {"bits", "", "nails*2 string glue rope tape"},
    {"instrument", "", "flute*2 trumpet*2 violin guitar piano harp"},
    {"food", "", "bread cheese honey milk rice soup butter jam apples pears plums cherries carrots nuts berries grapes"},
    {"tasty", "", "delicious wonderful sweet perfect"},
    {"vessel", "", "jar bag bowl sack"},
    {"indoors", "in", "garden*2 forest*2 park meadow barn valley castle"},
    {"waterside", "by", "river*2 lake*2 pond sea road mill"},
    {"upland", "on", "hill*2 farm*2 beach island"},
    {"under", "under", "bed*2 table*2 chair stairs carpet"},
    {"inside", "in", "box*2 drawer basket bucket cupboard boot"},
    {"behind", "behind", "door*2 curtain clock sofa stove"},
    {"landmark", "", "tree*2 rock*2 bush log fence gate well bench"},
    {"rag", "", "sock shoe spoon glove bottle"},
    {"crumbs", "", "dust sand leaves crumbs"},
    {"limb", "", "knee foot arm nose"},
    {"trait", "", "little*2 kind brave clever gentle quiet funny curious shy busy polite careful friendly cheeky"},
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
    {"chore", "", "wash_the_windows feed_the_hens sweep_the_floor count_the_sheep water_the_flowers mend_the_roof"},
    {"secret", "", "pumpkin rainbow butterfly cucumber moonlight bumblebee"},
    {"noise", "", "thunder lightning dark wind"},
    {"howl", "", "howl roar moan"},
    {"ran", "", "ran*2 walked hurried raced skipped"},
    {"said", "", "said*4 cried whispered called muttered shouted"},
    {"asked", "", "asked*3 wondered"},
    {"hugged", "", "hugged thanked kissed"},
    {"smile", "", "smile grin giggle wink"},
    {"softly", "", "softly quietly loudly gladly kindly at_once"},
    {"slowly", "", "slowly quickly carefully happily"},
};

// {hero.his} is the form "his" of the word that hero is bound to. Column 1 is that word's feature.
static const struct { const char *feature, *form, *text; } forms[] = {
    {"f", "he", "she"}, {"f", "He", "She"}, {"f", "his", "her"}, {"f", "His", "Her"}, {"f", "him", "her"},
    {"m", "he", "he"},  {"m", "He", "He"},  {"m", "his", "his"}, {"m", "His", "His"}, {"m", "him", "him"},
    {"in", "at", "in"}, {"by", "at", "by"}, {"on", "at", "on"}, {"under", "at", "under"}, {"behind", "at", "behind"},
};

// ----------------------------------------------------------------------------------------------------------------------------
// The grammar. Rows with the same name are the alternatives of one rule, with their weights. In the text:
//     <class>        a word drawn from the class and forgotten
//     {var=class}    a word drawn and remembered as var; words that the story already remembers are left out of the draw
//     {var} {var.form}   the remembered word, or a form of it: certain, if the reader has paid attention
//     [rule] [rule var]  another rule; inside it {$...} means var
//     `              a double quote
// The space before < and { belongs to the word; a rule brings its own. An empty alternative shows in the token that follows.

typedef struct GrammarText { const char *rule; int weight; const char *text; } GrammarText;

static const GrammarText grammar_texts[] = {
    {"story", 1, "[opening][home][clothes][family][when], {hero}[plot][end]"},

    {"opening", 5, "Once upon a time there was a <trait>[who hero]."},
    {"opening", 2, "There once lived a <trait>[who hero]."},
    {"opening", 2, "In a <size> house lived a <trait>[who hero]."},
    {"opening", 2, "Long ago there was a <trait> and <trait>[who hero]."},
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
    {"when", 2, " After some <food> with <food> for breakfast"},

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
    {"sigh", 2, " How <sad> {hero.he} was!"},
    {"sigh", 3, ""},
    {"thanks", 3, " `Thank you, {friend}!` <said> {hero}[tone]."},
    {"thanks", 2, " {hero} <hugged> {friend} and danced with joy."},
    {"thanks", 2, " Both friends laughed for <number> minutes."},
    {"pastime", 3, " They told stories about a <trait> <being> and a <size> <animal>."},
    {"pastime", 2, " Together they built a <size> tower out of <material> and <material>."},
    {"pastime", 2, " For <number> hours they played <game>."},
    {"pastime", 3, " {friend} drew a <colour> <animal>, and {hero} drew a <colour> <being>."},

    {"lost", 1, " could not find {hero.his} {c=colour} {x=toy}. `Where is my {x}?` {hero.he} <asked>[tone].[sigh]"
                " {hero.He} looked[spot a], but there was only[junk].[again][helper]"
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
                " `What are you hiding?` <asked> {friend}[tone]. `Nothing at all,` <said> {hero}[tone].[pastime]"
                " At last {hero} said, `Close your eyes, {friend}.` {hero.He} looked {a.at} the {a}.[surprise]"
                " `A {c} {x}, and it is for me!` <said> {friend}. {friend.He} was so <happy> that {friend.he}[rejoice]."},
    {"visit", 3, " Soon {friend} came to play."},
    {"visit", 2, " In the <daypart> {friend} knocked <number> times at the door."},
    {"surprise", 6, " The {x} was still there."},
    {"surprise", 4, " But the {x} was gone! `I put it[spot b],` <said> {hero.his} <kin>. And there it was."},
    {"rejoice", 3, " kept the {c} {x}[spot d] for ever"},
    {"rejoice", 2, " showed the {c} {x} to the <job>"},
    {"rejoice", 2, " <hugged> {hero} <number> times"},

    {"errand", 1, " had to go to the market."
                  " `Please bring me some {f=food}, some {g=food} and a {c=colour} {x=ware},` said {hero.his} {kin=kin}[tone]."
                  " On the way {hero.he} met a <trait> {pal=animal}. `Come and play <game> with me,` <said> the {pal}.[play]"
                  " Suddenly {hero} stopped. `Oh no! What did I have to buy?`[think]"
                  " `I know it,` {hero.he} <said>[tone]. `Some {f}, some {g} and a {c} {x}!`"
                  " The <trait> <job> put everything into a <size> <vessel>.[basket]"
                  " `You did not forget anything!` <said> {hero.his} {kin}[tone]."},
    {"play", 3, " So they played until {hero} was <sad>."},
    {"play", 2, " {hero} forgot the market and played for <number> hours."},
    {"play", 2, " What fun they had!"},
    {"think", 3, " {hero.He} sat down next to a <landmark> and tried to remember."},
    {"think", 2, " `Think of your {kin},` <said> the {pal}."},
    {"think", 2, " The {pal} could not help."},
    {"basket", 3, " {hero.He} <ran> home with the {f}, the {g} and the {c} {x}."},
    {"basket", 2, " That evening there was {g} with {f} for dinner, and the {c} {x} was on the table."},

    {"hungry", 1, " met a {s=sad} {pal=animal}[place p]. `Why are you crying?` <asked> {hero}[tone]."
                  " `I am hungry, and I only like {f=food},` <said> the {pal}[tone].[offer] So {hero} <ran> to the {job=job}."
                  " `I will give you {f} if you {chore=chore},` said the {job}.[work]"
                  " Then the {job} gave {hero.him} a <size> <vessel> of {f}. {hero} <ran> back to the {p}."
                  " The {pal} ate the {f} <slowly> and was not {s} any more."
                  " `Take my {c=colour} {x=treasure},` <said> the {pal}[tone]. `It will bring you luck.`"
                  " To this day {hero} keeps the {c} {x}[spot a]."},
    {"offer", 3, " At home there was only some {y=food} with {z=food}."},
    {"offer", 2, " `Wait next to the <landmark>,` <said> {hero}."},
    {"offer", 2, " {hero} had no {f} at home."},
    {"work", 3, " {hero} began to {chore} at once."},
    {"work", 2, " It was hard to {chore}, but {hero} did it <slowly>."},

    {"race", 1, " heard about a race[place p]. The prize was a {c=colour} {x=toy}."
                " {hero.His} <trait> friend {friend=name} the {pal=animal} wanted to win it, too."
                " `Ready, steady, go!` <said> the {job=job}[tone].[running]"
                " Near the end {friend} fell over a <size> <landmark> and hurt {friend.his} {limb=limb}.[finish]"
                " That is how the race {p.at} the {p} ended."},
    {"running", 3, " {friend} was as fast as a <animal>."},
    {"running", 3, " {hero} was first, but {friend} ran faster and faster."},
    {"running", 2, " Side by side they ran past <number> <size> houses."},
    {"finish", 6, " {hero} stopped at once.[bandage] Then they <ran> to the end hand in hand."
                  " `You both win,` <said> the {job}[tone], and the {c} {x} was for {hero} and {friend} together."},
    {"finish", 4, " Nobody saw it, and {hero} won. But the {c} {x} did not make {hero.him} <happy>."
                  " So {hero.he} gave it to {friend} the {pal}, and {friend.his} {limb} did not hurt any more."},
    {"bandage", 3, " `How is your {limb}?` {hero.he} <asked>[tone]."},
    {"bandage", 2, " {hero.He} put a <colour> bandage on {friend.his} {limb}."},

    {"storm", 1, " saw a storm coming. The wind <howl>ed and {hero.his} <trait> friend {friend=name} hid[spot a]."
                 " `I am afraid of the {noise=noise},` <said> {friend} <softly>."
                 " {hero} lit a {c=colour} candle and told a story. `A <trait> {m=being} once lost a {d=colour} {x=treasure}."
                 " It was not[place p] and it was not[place q]. The {m} found only[junk].[return]`"
                 " `Was the {m} <happy>?` <asked> {friend}. `Yes,` <said> {hero}[tone],"
                 " `and the {d} {x} was never lost again.` Soon the storm was over.[calm]"},
    {"return", 3, " At last a <trait> <animal> brought the {d} {x} back."},
    {"return", 2, " Then, <number> days later, the {d} {x} was[spot b]."},
    {"calm", 3, " {friend} blew out the {c} candle and was not afraid of the {noise} any more."},
    {"calm", 2, " Nobody was {a.at} the {a} now, and the {c} candle went out <slowly>."},

    {"build", 1, " began to build a <size> {x=craft} out of {m=material}."
                 " {hero.His} {kin=kin} brought {hero.him} a <colour> <tool> and some <bits>.[toil] But the {x}[broken].[sigh]"
                 " `Do not use {m}, use {n=material},` <said> {hero.his} friend {friend=name}[tone]."
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
                " But {hero.he} could not find any[missing] {hero} <slowly> mixed the {f}, the {g} and the {h} in a <size> bowl."
                "[oven] {hero.His} {kin} took a bite. `I can taste {f}, {g} and {h},` {kin.he} <said>[tone]. `It is <tasty>!`"
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
                " When {hero.he} rubbed it, a <size> {m=being} came out. `You have three wishes,` <said> the {m}[tone]."
                " First {hero} wished for some {f=food}. Then {hero.he} wished for a {d=colour} {y=toy}."
                " But {hero.he} still felt {s=sad}.[advice]"
                " So {hero} wished for a friend, and there was a <trait>[who friend]![share] {hero} was not {s} any more."
                " The {m} went back into the {c} {x} and slept for <number> years."},
    {"advice", 3, " `You need a friend,` <said> the {m}[tone]."},
    {"advice", 2, " It is no fun to be alone."},
    {"share", 3, " Together they <slowly> ate the {f} and played with the {d} {y}."},
    {"share", 2, " {hero} gave {friend} the {d} {y}, and they ate the {f} with some <food>."},

    {"seeds", 1, " planted {n=number} seeds[place p]. Every <daypart> {hero.he} gave them water.[sprout]"
                 " Then a <size> {pal=animal} came by. `I will eat your plants,` <said> the {pal}[tone]."
                 " `Please do not,` <said> {hero}[tone]. `I will bring you some {f=food}.`"
                 " {hero} <ran> home and came back with the {f}.[guard]"
                 " In {season=season} there were {n} {c=colour} {y=flower} {p.at} the {p}."
                 " {hero} gave one to {hero.his} <trait> <kin> and one to the {pal} that liked {f}."},
    {"sprout", 3, " After a week there were {n} <size> plants."},
    {"sprout", 2, " `Grow, grow, grow,` {hero.he} <said>[tone]."},
    {"sprout", 2, " They grew <slowly>."},
    {"guard", 3, " From that day on, the {pal} took care of the {n} plants and chased away the <bugs>."},
    {"guard", 2, " `I like you,` <said> the {pal}[tone], and ate the {f} <slowly>."},

    {"secret", 1, " discovered a tiny <colour> door[spot a]. `What is the secret word?` <asked> a voice[tone].[guess]"
                  " Then a <trait> {pal=animal} came by. `The word is {w=secret},` <said> the {pal}[tone].[repeat]"
                  " The next <daypart> {hero} <ran> back to the door {a.at} the {a}."
                  " `The secret word is {w},` {hero.he} <said>[tone]. The door opened, and there sat a <trait> {m=being}."
                  " `Well done,` <said> the {m}. `This {c=colour} {x=treasure} is for you.`"
                  " {hero} showed the {c} {x} to the {pal} and never told anyone the word {w}."},
    {"guess", 3, " `Is it {v=secret}?` <asked> {hero}. It was not {v}."},
    {"guess", 2, " {hero} asked {hero.his} <kin> and the <job>, but nobody knew."},
    {"repeat", 3, " {hero} said it <number> times, so as not to forget it."},
    {"repeat", 2, " `That is easy,` <said> {hero}[tone]."},

    {"concert", 1, " got a {c=colour} {i=instrument} from {hero.his} {kin=kin}."
                   " `There is a concert[place p] on {d=weekday},` {kin.he} <said>[tone]."
                   " At first the {i} sounded like a <sad> {pal=animal}.[tease] But {hero} played it every <daypart>.[practice]"
                   " On {d} everyone came to the {p}. `You can do it,` <said> {friend}[tone]."
                   " {hero} took the {c} {i} and played.[applause] `That was not a {pal},` <said> {hero.his} {kin}[tone]."
                   " `That was the best {i} in the world!`"},
    {"tease", 3, " {hero.His} <trait> friend {friend=name} laughed."},
    {"tease", 2, " `Stop it,` <said> {hero.his} friend {friend=name}[tone]."},
    {"practice", 3, " After <number> days it got better."},
    {"practice", 2, " Even {friend} and the <job> began to like it."},
    {"applause", 3, " The <trait> <job> began to dance."},
    {"applause", 2, " How <happy> they all were!"},
    {"applause", 2, " A <trait> <being> gave {hero.him} some <flower>."},
};

// ----------------------------------------------------------------------------------------------------------------------------
// The compiler. It reads the tables above once to collect the vocabulary and once more to turn every alternative into symbols.

enum {
    SEQ_LEN = 256,        // T: a window has T+1 tokens, <|endoftext|> and whole stories
    EOD = 256,            // <|endoftext|>: begin and end of a document; ids below it are the 256 bytes, ids above are words
    MAX_PIECES = 1024, MAX_WORDS = 1024, MAX_RULES = 128, MAX_ALTERNATIVES = 256, MAX_SYMBOLS = 8192, MAX_CLASSES = 64,
    MAX_CLASS_WORDS = 64, MAX_VARS = 32, MAX_NAME = 32, MAX_WORD_TOKENS = 8, MAX_DEPTH = 16, SHARD_TOKENS = 3000000
};
enum { TOKEN, DRAW, RECALL, CALL };   // the four kinds of symbols

typedef struct Symbol { int op, id, var, form; } Symbol;   // id: token, class or rule; var: -1 = none, 0 = "$"; form: -1 = none
typedef struct Word { char text[MAX_NAME]; const char *feature; int n, tokens[MAX_WORD_TOKENS]; } Word;
typedef struct Class { int n, words[MAX_CLASS_WORDS], weights[MAX_CLASS_WORDS]; } Class;
typedef struct Alternative { int weight, first, n; } Alternative;   // symbols first .. first+n-1
typedef struct Rule { const char *name; int first, n, weight; } Rule;   // alternatives first .. first+n-1 and their total weight
typedef struct Names { int n; char text[MAX_VARS][MAX_NAME]; } Names;

typedef struct Grammar {
    char pieces[MAX_PIECES][MAX_NAME];   // piece of token id i; sorted above EOD
    int n_pieces, n_rules, n_alternatives, n_symbols, n_words, n_content_words;
    Word words[MAX_WORDS];               // everything that is drawn or recalled
    Class classes[MAX_CLASSES];
    Rule rules[MAX_RULES];
    Alternative alternatives[MAX_ALTERNATIVES];
    Symbol symbols[MAX_SYMBOLS];
    Names vars;
    int form_words[32];                  // word of each row of forms
    int collecting;                      // first reading: literals become pieces, not symbols
} Grammar;

static void die(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fprintf(stderr, "error: ");
    vfprintf(stderr, fmt, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

#define COUNT(table) ((int)(sizeof(table) / sizeof((table)[0])))

static void add_piece(Grammar *g, const char *text) {
    for (int i = EOD + 1; i < g->n_pieces; i++) if (strcmp(g->pieces[i], text) == 0) return;
    if (g->n_pieces == MAX_PIECES || strlen(text) >= MAX_NAME) die("no room for the piece '%s'", text);
    strcpy(g->pieces[g->n_pieces++], text);
}

// A literal piece of text: one word with the space before it, or one punctuation mark with the space before it.
static const char *next_unit(const char *p, char *unit) {
    int n = 0;
    if (*p == ' ') unit[n++] = *p++;
    if (isalpha((unsigned char)*p)) while (isalpha((unsigned char)*p) && n < MAX_NAME - 1) unit[n++] = *p++;
    else { unit[n++] = *p == '`' ? '"' : *p; p++; }
    unit[n] = 0;
    return p;
}

// Greedy longest match, as every reader of a kind 1 tokenizer.bin does it; bytes that start no piece become byte tokens.
static int encode(const Grammar *g, const char *text, int *tokens, int max_tokens) {
    int n = 0;
    for (const char *p = text; *p;) {
        int best = (unsigned char)*p;
        size_t best_length = 0;
        for (int i = EOD + 1; i < g->n_pieces; i++) {
            size_t length = strlen(g->pieces[i]);
            if (length > best_length && strncmp(p, g->pieces[i], length) == 0) { best = i; best_length = length; }
        }
        if (n == max_tokens) die("too many tokens in '%s'", text);
        tokens[n++] = best;
        p += best_length ? best_length : 1;
    }
    return n;
}

// The literal text between two other symbols.
static void compile_literal(Grammar *g, const char *text, const char *end) {
    while (text < end) {
        char unit[MAX_NAME];
        int tokens[MAX_WORD_TOKENS];
        text = next_unit(text, unit);
        if (g->collecting) { add_piece(g, unit); continue; }
        int n = encode(g, unit, tokens, MAX_WORD_TOKENS);
        for (int i = 0; i < n; i++) {
            if (g->n_symbols == MAX_SYMBOLS) die("the grammar has more than %d symbols", MAX_SYMBOLS);
            Symbol *s = &g->symbols[g->n_symbols++];
            s->op = TOKEN; s->id = tokens[i]; s->var = s->form = -1;
        }
    }
}

static int find_class(const char *name) {
    for (int i = 0; i < COUNT(class_texts); i++) if (strcmp(class_texts[i].name, name) == 0) return i;
    die("the grammar has no class '%s'", name);
    return -1;
}

static int find_rule(const Grammar *g, const char *name) {
    for (int i = 0; i < g->n_rules; i++) if (strcmp(g->rules[i].name, name) == 0) return i;
    die("the grammar has no rule '%s'", name);
    return -1;
}

static int find_form(const char *name) {   // any row of that form
    for (int i = 0; i < COUNT(forms); i++) if (strcmp(forms[i].form, name) == 0) return i;
    die("the grammar has no form '%s'", name);
    return -1;
}

static int find_var(Grammar *g, const char *name) {   // a new name is a new variable
    int i = 0;
    while (i < g->vars.n && strcmp(g->vars.text[i], name) != 0) i++;
    if (i == MAX_VARS) die("the grammar has more than %d variables", MAX_VARS);
    if (i == g->vars.n) strcpy(g->vars.text[g->vars.n++], name);
    return i;
}

// text points at < { or [; returns what follows the closing bracket.
static const char *compile_bracket(Grammar *g, const char *text) {
    char open = *text, inside[2 * MAX_NAME], *mark;
    const char *end = strchr(text, open == '<' ? '>' : open == '{' ? '}' : ']');
    if (!end || (size_t)(end - text) > sizeof inside) die("bracket without end in the grammar: %s", text);
    memcpy(inside, text + 1, (size_t)(end - text) - 1);
    inside[end - text - 1] = 0;
    if (g->n_symbols == MAX_SYMBOLS) die("the grammar has more than %d symbols", MAX_SYMBOLS);
    Symbol *s = &g->symbols[g->n_symbols++];
    s->id = s->var = s->form = -1;
    if (open == '<') {
        s->op = DRAW;
        s->id = find_class(inside);
    } else if (open == '[') {
        s->op = CALL;
        if ((mark = strchr(inside, ' '))) { *mark = 0; s->var = find_var(g, mark + 1); }
        s->id = find_rule(g, inside);
    } else if ((mark = strchr(inside, '='))) {
        s->op = DRAW;
        s->id = find_class(mark + 1);
        *mark = 0;
        s->var = find_var(g, inside);
    } else {
        s->op = RECALL;
        if ((mark = strchr(inside, '.'))) { *mark = 0; s->form = find_form(mark + 1); }
        s->var = find_var(g, inside);
    }
    return end + 1;
}

static void compile_text(Grammar *g, const char *text) {
    while (*text) {
        const char *p = text + strcspn(text, "<{[");
        if (*p && *p != '[' && (p == text || p[-1] != ' ')) die("a drawn word needs a space before it: %s", text);
        compile_literal(g, text, *p == '<' || *p == '{' ? p - 1 : p);
        text = *p ? compile_bracket(g, p) : p;
    }
}

static void compile_rules(Grammar *g, int collecting) {
    g->collecting = collecting;
    g->n_symbols = 0;
    for (int i = 0; i < COUNT(grammar_texts); i++) {
        Alternative *a = &g->alternatives[i];
        a->weight = grammar_texts[i].weight;
        a->first = g->n_symbols;
        compile_text(g, grammar_texts[i].text);
        a->n = g->n_symbols - a->first;
    }
}

static void collect_rules(Grammar *g) {
    if (COUNT(grammar_texts) > MAX_ALTERNATIVES) die("the grammar has more than %d alternatives", MAX_ALTERNATIVES);
    for (int i = 0; i < COUNT(grammar_texts); i++) {
        if (i == 0 || strcmp(grammar_texts[i].rule, grammar_texts[i - 1].rule) != 0) {
            if (g->n_rules == MAX_RULES) die("the grammar has more than %d rules", MAX_RULES);
            Rule *r = &g->rules[g->n_rules++];
            r->name = grammar_texts[i].rule;
            r->first = i;
        }
        g->rules[g->n_rules - 1].n++;
        g->rules[g->n_rules - 1].weight += grammar_texts[i].weight;
    }
}

static int add_word(Grammar *g, const char *text, const char *feature) {
    for (int i = 0; i < g->n_words; i++)
        if (strcmp(g->words[i].text, text) == 0 && strcmp(g->words[i].feature, feature) == 0) return i;
    if (g->n_words == MAX_WORDS) die("the grammar has more than %d words", MAX_WORDS);
    Word *w = &g->words[g->n_words];
    strcpy(w->text, text);
    w->feature = feature;
    return g->n_words++;
}

// Adds the words of class `from` to class `to`.
static void collect_class(Grammar *g, int to, int from) {
    char item[MAX_NAME], text[MAX_NAME + 1];
    int n_chars;
    for (const char *p = class_texts[from].words; sscanf(p, "%31s%n", item, &n_chars) == 1; p += n_chars) {
        if (item[0] == '@') { collect_class(g, to, find_class(item + 1)); continue; }
        Class *c = &g->classes[to];
        if (c->n == MAX_CLASS_WORDS) die("class %s has more than %d words", class_texts[to].name, MAX_CLASS_WORDS);
        char *star = strchr(item, '*');
        c->weights[c->n] = star ? atoi(star + 1) : 1;
        if (star) *star = 0;
        snprintf(text, sizeof text, " %s", item);
        for (char *t = text; *t; t++) if (*t == '_') *t = ' ';
        c->words[c->n++] = add_word(g, text, class_texts[from].feature);
    }
}

static int compare_pieces(const void *a, const void *b) { return strcmp((const char *)a, (const char *)b); }

// Sorts the pieces; a word that is another word with a suffix becomes two pieces, so the suffix is learned once: " look" "ed".
static void finish_pieces(Grammar *g) {
    static const char *const suffixes[] = {"ed", "d", "s", "er"};
    int n = EOD + 1;
    for (int i = 0; i < COUNT(suffixes); i++) add_piece(g, suffixes[i]);
    qsort(g->pieces[n], (size_t)(g->n_pieces - n), sizeof g->pieces[0], compare_pieces);
    for (int i = n; i < g->n_pieces; i++) {
        char stem[MAX_NAME];
        int is_derived = 0;
        for (int k = 0; k < COUNT(suffixes); k++) {
            size_t length = strlen(g->pieces[i]), cut = strlen(suffixes[k]);
            if (length < cut + 4 || strcmp(g->pieces[i] + length - cut, suffixes[k]) != 0) continue;
            strcpy(stem, g->pieces[i]);
            stem[length - cut] = 0;
            for (int j = EOD + 1; j < n; j++) is_derived |= strcmp(g->pieces[j], stem) == 0;   // a stem sorts before its word
        }
        if (!is_derived) memmove(g->pieces[n++], g->pieces[i], sizeof g->pieces[0]);
    }
    g->n_pieces = n;
}

static Grammar *grammar_create(void) {
    Grammar *g = (Grammar *)calloc(1, sizeof(Grammar));
    if (!g) die("out of memory");
    for (int i = 0; i < 256; i++) snprintf(g->pieces[i], MAX_NAME, "<0x%02X>", (unsigned)i);
    strcpy(g->pieces[EOD], "<|endoftext|>");
    g->n_pieces = EOD + 1;
    find_var(g, "$");
    if (COUNT(class_texts) > MAX_CLASSES) die("the grammar has more than %d classes", MAX_CLASSES);
    for (int i = 0; i < COUNT(class_texts); i++) collect_class(g, i, i);
    g->n_content_words = g->n_words;
    for (int i = 0; i < COUNT(forms); i++) {
        char text[MAX_NAME];
        snprintf(text, sizeof text, " %s", forms[i].text);
        g->form_words[i] = add_word(g, text, "");
    }
    collect_rules(g);
    compile_rules(g, 1);
    for (int i = 0; i < g->n_words; i++) compile_literal(g, g->words[i].text, strchr(g->words[i].text, 0));
    finish_pieces(g);
    for (int i = 0; i < g->n_words; i++) g->words[i].n = encode(g, g->words[i].text, g->words[i].tokens, MAX_WORD_TOKENS);
    compile_rules(g, 0);
    return g;
}

// The most tokens that `rule` can give: no story may be cut by chance, or its probabilities would be wrong. var_tokens[v] is the
// longest word that v may hold; it grows while we look, so the caller asks twice.
static int longest(const Grammar *g, int rule, int param, int *var_tokens, int depth) {
    if (depth == MAX_DEPTH) die("the rule %s calls itself", g->rules[rule].name);
    int best = 0;
    for (int a = 0; a < g->rules[rule].n; a++) {
        const Alternative *alt = &g->alternatives[g->rules[rule].first + a];
        int n = 0;
        for (int i = alt->first; i < alt->first + alt->n; i++) {
            const Symbol *s = &g->symbols[i];
            int var = s->var == 0 ? param : s->var, n_word = 0;
            if (s->op == TOKEN) n += 1;
            if (s->op == CALL) n += longest(g, s->id, s->var < 0 ? param : var, var_tokens, depth + 1);
            if (s->op == RECALL) n += var_tokens[var];
            if (s->op != DRAW) continue;
            for (int k = 0; k < g->classes[s->id].n; k++) {
                const Word *w = &g->words[g->classes[s->id].words[k]];
                if (w->n > n_word) n_word = w->n;
            }
            if (var >= 0 && n_word > var_tokens[var]) var_tokens[var] = n_word;
            n += n_word;
        }
        if (n > best) best = n;
    }
    return best;
}

static int longest_story(const Grammar *g) {   // with its <|endoftext|>
    int var_tokens[MAX_VARS] = {0}, story = find_rule(g, "story");
    longest(g, story, 0, var_tokens, 0);
    return longest(g, story, 0, var_tokens, 0) + 1;
}

// ----------------------------------------------------------------------------------------------------------------------------
// The storyteller. It walks down the grammar; p collects the probability of the choices made since the last token.

typedef struct Story {
    const Grammar *g;
    uint64_t rng;
    double p;
    int n, bound[MAX_VARS];            // bound[v]: the word of variable v, -1 = none yet
    uint16_t tokens[SEQ_LEN + 1];
    float nll[SEQ_LEN + 1];            // -ln p(tokens[i] | the story before it)
} Story;

static uint64_t splitmix64(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

// 0 .. n-1, each with the same probability (to 2^-50: n is a few hundred at most).
static int random_below(Story *s, int n) { return (int)((splitmix64(&s->rng) >> 32) * (uint64_t)n >> 32); }

static void tell_token(Story *s, int token) {
    if (s->n > SEQ_LEN) die("a story is longer than %d tokens", SEQ_LEN);
    s->tokens[s->n] = (uint16_t)token;
    s->nll[s->n++] = s->p == 1 ? 0.0f : (float)-log(s->p);
    s->p = 1;
}

static void tell_word(Story *s, int word) {
    for (int i = 0; i < s->g->words[word].n; i++) tell_token(s, s->g->words[word].tokens[i]);
}

static int is_bound(const Story *s, int word) {
    for (int v = 0; v < s->g->vars.n; v++) if (s->bound[v] == word) return 1;
    return 0;
}

static void tell_draw(Story *s, const Class *c, int var) {
    int total = 0, i = 0;
    for (int k = 0; k < c->n; k++) if (var < 0 || !is_bound(s, c->words[k])) total += c->weights[k];
    int left = random_below(s, total);
    for (;; i++) {
        if (var >= 0 && is_bound(s, c->words[i])) continue;
        if (left < c->weights[i]) break;
        left -= c->weights[i];
    }
    s->p *= (double)c->weights[i] / total;
    tell_word(s, c->words[i]);
    if (var >= 0) s->bound[var] = c->words[i];
}

static void tell_recall(Story *s, int var, int form) {
    const Grammar *g = s->g;
    int word = s->bound[var];
    if (word < 0) die("the grammar recalls {%s} before it is drawn", g->vars.text[var]);
    if (form < 0) { tell_word(s, word); return; }
    for (int i = 0; i < COUNT(forms); i++)
        if (strcmp(forms[i].form, forms[form].form) == 0 && strcmp(forms[i].feature, g->words[word].feature) == 0) {
            tell_word(s, g->form_words[i]);
            return;
        }
    die("the grammar has no form '%s' of '%s'", forms[form].form, g->words[word].text);
}

static void tell_rule(Story *s, int rule, int param) {
    const Rule *r = &s->g->rules[rule];
    const Alternative *a = &s->g->alternatives[r->first];
    int left = random_below(s, r->weight);
    for (; left >= a->weight; a++) left -= a->weight;
    s->p *= (double)a->weight / r->weight;
    for (int i = a->first; i < a->first + a->n; i++) {
        const Symbol *y = &s->g->symbols[i];
        int var = y->var == 0 ? param : y->var;
        if (y->op == TOKEN) tell_token(s, y->id);
        if (y->op == DRAW) tell_draw(s, &s->g->classes[y->id], var);
        if (y->op == RECALL) tell_recall(s, var, y->form);
        if (y->op == CALL) tell_rule(s, y->id, y->var < 0 ? param : var);
    }
}

// Story `index` of a stream, a pure function of (seed, stream, index). It ends with <|endoftext|>.
static void story_tell(Story *s, const Grammar *g, uint64_t seed, uint64_t stream, uint64_t index) {
    s->g = g;
    s->rng = seed;
    s->rng = splitmix64(&s->rng) ^ stream;
    s->rng = splitmix64(&s->rng) ^ index;
    s->n = 0;
    s->p = 1;
    for (int v = 0; v < MAX_VARS; v++) s->bound[v] = -1;
    tell_rule(s, find_rule(g, "story"), 0);
    tell_token(s, EOD);
}

// ----------------------------------------------------------------------------------------------------------------------------
// The files. Each is written under a temporary name and renamed; stories.json comes last, so it marks a whole set.

enum { TRAIN_STREAM, VAL_STREAM, PRINT_STREAM };

typedef struct File { FILE *f; char path[1024], temp[1040]; } File;

static void file_check(const File *file, int ok) {
    if (!ok) die("cannot write %s: %s", file->path, strerror(errno));
}

static void file_open(File *file, const char *dir, const char *name) {
    if (snprintf(file->path, sizeof file->path, "%s/%s", dir, name) >= (int)sizeof file->path) die("the path %s is too long", dir);
    snprintf(file->temp, sizeof file->temp, "%s.tmp", file->path);
    file->f = fopen(file->temp, "wb");
    file_check(file, file->f != NULL);
}

static void file_write(File *file, const void *data, size_t n) { file_check(file, fwrite(data, 1, n, file->f) == n); }

static void file_close(File *file) {
    file_check(file, fflush(file->f) == 0 && fsync(fileno(file->f)) == 0);
    file_check(file, fclose(file->f) == 0);
    file_check(file, rename(file->temp, file->path) == 0);
}

static void make_dirs(const char *dir) {
    char path[1024];
    if (snprintf(path, sizeof path, "%s", dir) >= (int)sizeof path) die("the path %s is too long", dir);
    for (char *p = path + 1; ; p++) {
        char c = *p;
        if (c && c != '/') continue;
        *p = 0;
        if (mkdir(path, 0777) != 0 && errno != EEXIST) die("cannot make the folder %s: %s", path, strerror(errno));
        if (!c) return;
        *p = c;
    }
}

// zlib's CRC-32
static uint32_t crc32_of(const void *data, size_t n) {
    uint32_t table[256], crc = 0xFFFFFFFFu;
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int k = 0; k < 8; k++) table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xEDB88320u : 0);
    }
    for (const unsigned char *p = (const unsigned char *)data; n--; p++) crc = crc >> 8 ^ table[(crc ^ *p) & 255];
    return ~crc;
}

// Every file is little endian, as every machine that this runs on.
static void write_shard(const Grammar *g, const char *dir, int shard, const uint16_t *tokens, int n) {
    char name[32];
    int32_t header[256] = {20240520, 1, n, g->n_pieces, 0, EOD + 1};
    uint32_t crc = crc32_of(tokens, 2 * (size_t)n);
    File file;
    memcpy(&header[4], &crc, 4);
    snprintf(name, sizeof name, "train_%03d.bin", shard);
    file_open(&file, dir, name);
    file_write(&file, header, sizeof header);
    file_write(&file, tokens, 2 * (size_t)n);
    file_close(&file);
}

typedef struct Totals { int64_t tokens, stories, val_rows; double floor; int longest; } Totals;

static void write_train(const Grammar *g, const char *dir, uint64_t seed, int64_t n_tokens, Totals *totals) {
    uint16_t *tokens = (uint16_t *)malloc((SHARD_TOKENS + SEQ_LEN + 2) * sizeof(uint16_t));
    Story story;
    char path[1100];
    int shard = 0;
    if (!tokens) die("out of memory");
    while (totals->tokens < n_tokens) {
        int64_t want = n_tokens - totals->tokens;
        int n = 0;
        tokens[n++] = EOD;   // each shard, too, begins where a story begins
        while (n < want && n < SHARD_TOKENS) {
            story_tell(&story, g, seed, TRAIN_STREAM, (uint64_t)totals->stories++);
            memcpy(tokens + n, story.tokens, (size_t)story.n * sizeof(uint16_t));
            n += story.n;
        }
        write_shard(g, dir, shard++, tokens, n);
        totals->tokens += n;
    }
    free(tokens);
    do snprintf(path, sizeof path, "%s/train_%03d.bin", dir, shard++); while (remove(path) == 0);   // of a longer run before
}

// Rows of T+1 tokens: <|endoftext|>, then whole stories, the last one cut. Every target has its whole story in sight.
static void write_val(const Grammar *g, const char *dir, uint64_t seed, int64_t n_rows, Totals *totals) {
    char val_dir[1024], json[512];
    File rows, nll, metadata;
    Story story;
    uint64_t index = 0;
    double sum = 0;
    if (snprintf(val_dir, sizeof val_dir, "%s/val", dir) >= (int)sizeof val_dir) die("the path %s is too long", dir);
    make_dirs(val_dir);
    file_open(&rows, val_dir, "val_000.ds");
    file_open(&nll, val_dir, "val_000.nll");
    for (int64_t r = 0; r < n_rows; r++) {
        uint16_t row[SEQ_LEN + 1] = {EOD};
        float row_nll[SEQ_LEN];
        for (int t = 0; t < SEQ_LEN;) {
            story_tell(&story, g, seed, VAL_STREAM, index++);
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
    int n = snprintf(json, sizeof json, "{\n  \"dataset\": \"stories\",\n  \"tokenizer\": \"tokenizer.bin\",\n  \"split\": \"validation\",\n"
                     "  \"vocab_size\": %d,\n  \"sequence_length\": %d,\n  \"token_size_bytes\": 2,\n  \"eos_token_id\": %d,\n"
                     "  \"total_sequences\": %lld,\n  \"total_tokens\": %lld\n}\n", g->n_pieces, SEQ_LEN, EOD, (long long)n_rows,
                     (long long)n_rows * (SEQ_LEN + 1));
    file_open(&metadata, val_dir, "metadata.json");
    file_write(&metadata, json, (size_t)n);
    file_close(&metadata);
    totals->val_rows = n_rows;
    totals->floor = sum / ((double)n_rows * SEQ_LEN);
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

static void write_marker(const Grammar *g, const char *dir, uint64_t seed, const Totals *t) {
    char json[512];
    File file;
    int n = snprintf(json, sizeof json, "{\n  \"seed\": %llu,\n  \"train_tokens\": %lld,\n  \"train_stories\": %lld,\n"
                     "  \"val_rows\": %lld,\n  \"vocab_size\": %d,\n  \"content_words\": %d,\n  \"longest_story\": %d,\n"
                     "  \"floor\": %.6f,\n  \"complete\": true\n}\n", (unsigned long long)seed, (long long)t->tokens,
                     (long long)t->stories, (long long)t->val_rows, g->n_pieces, g->n_content_words, t->longest, t->floor);
    file_open(&file, dir, "stories.json");
    file_write(&file, json, (size_t)n);
    file_close(&file);
}

static void print_story(const Story *s) {
    for (int i = 0; i < s->n - 1; i++) fputs(s->g->pieces[s->tokens[i]], stdout);
    fputs("\n\n", stdout);
}

// ----------------------------------------------------------------------------------------------------------------------------
#ifndef STORIES_NO_MAIN

static const char usage[] =
    "usage: stories [--out DIR] [--train-tokens N] [--val-rows N] [--seed S]\n"
    "       stories --print N [--seed S]\n"
    "Writes training and validation stories with their true loss to DIR (default data/stories), or prints N stories.\n";

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
    int64_t n_tokens = 6000000, n_rows = 256, seed = 1, n_print = 0;
    for (int i = 1; i < argc; i += 2) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (strcmp(name, "--help") == 0) { fputs(usage, stdout); return 0; }
        if (strcmp(name, "--out") == 0 && *value) dir = value;
        else if (strcmp(name, "--train-tokens") == 0) n_tokens = parse_int(name, value, SEQ_LEN + 1, 1000000000);
        else if (strcmp(name, "--val-rows") == 0) n_rows = parse_int(name, value, 1, 1000000);
        else if (strcmp(name, "--seed") == 0) seed = parse_int(name, value, 0, INT64_MAX);
        else if (strcmp(name, "--print") == 0) n_print = parse_int(name, value, 1, 1000000);
        else if (strcmp(name, "--out") == 0) die("--out wants a folder");
        else die("unknown option '%s', try --help", name);
    }

    Grammar *g = grammar_create();
    Totals totals = {0, 0, 0, 0, longest_story(g)};
    if (totals.longest > SEQ_LEN - 1) die("a story may take %d tokens, more than %d", totals.longest, SEQ_LEN - 1);
    if (n_print) {
        Story story;
        for (int64_t i = 0; i < n_print; i++) {
            story_tell(&story, g, (uint64_t)seed, PRINT_STREAM, (uint64_t)i);
            print_story(&story);
        }
        free(g);
        return 0;
    }

    char marker[1100];
    make_dirs(dir);
    snprintf(marker, sizeof marker, "%s/stories.json", dir);
    if (remove(marker) != 0 && errno != ENOENT) die("cannot remove %s: %s", marker, strerror(errno));
    write_tokenizer(g, dir);
    write_val(g, dir, (uint64_t)seed, n_rows, &totals);
    write_train(g, dir, (uint64_t)seed, n_tokens, &totals);
    write_marker(g, dir, (uint64_t)seed, &totals);
    printf("stories: %s | %lld training tokens in %lld stories | %lld validation rows of %d | vocabulary %d | %d content words | "
           "floor %.4f nats per token | longest possible story %d tokens\n", dir, (long long)totals.tokens, (long long)totals.stories,
           (long long)totals.val_rows, SEQ_LEN + 1, g->n_pieces, g->n_content_words, totals.floor, totals.longest);
    free(g);
    return 0;
}
#endif

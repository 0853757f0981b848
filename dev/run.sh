#!/bin/sh
# Several ranks, by Open MPI's mpirun, whose options stand before the program:
#     dev/run.sh -np 2 ./train_litespark OPTIONS
# mpirun alone is wrong for training in three ways. It binds a rank to one core. At Ctrl-C or TERM it kills the ranks: Open MPI 4 a
# second later, Open MPI 5 half a second, neither with an option for more. USR1 it passes on. So here mpirun runs in a session of
# its own, where the terminal's Ctrl-C does not reach it, and INT, TERM and HUP become USR1: the ranks save, and the status is 0.
# A second Ctrl-C, two seconds after the first or later, ends the ranks without saving. And Open MPI 4.1.4 can hang for ever where
# ranks die while they start (a lock in PMIx_server_finalize): once its children are gone for 20 seconds it is killed. On a busy
# machine it once did not pass a USR1 on, so each is sent again a few seconds later, which does the ranks no harm.
command -v mpirun >/dev/null || { echo 'error: dev/run.sh: there is no mpirun: apt-get install openmpi-bin libopenmpi-dev' >&2; exit 1; }
[ $# -gt 0 ] || { echo 'usage: dev/run.sh -np RANKS [mpirun OPTIONS] ./train_litespark OPTIONS' >&2; exit 1; }
# What mpirun takes for something else (-np 0: all its slots), or answers with a page that does not name the mistake.
fail() { echo "error: dev/run.sh: $*" >&2; exit 1; }
before='' program=''
for word; do
    taken=yes
    case $before in
    -np | --np | -n | --n)
        case $word in
        0* | *[!0-9]* | '') fail "$before '$word': say how many ranks, a whole number from 1 on" ;;
        esac ;;
    -hostfile | --hostfile | -machinefile | --machinefile | --default-hostfile)
        if [ -d "$word" ] || [ ! -r "$word" ]; then fail "$before '$word' cannot be read: name a file with lines such as 'HOST slots=8'"; fi ;;
    *) taken='' ;;
    esac
    if [ -f "$word" ] && [ -x "$word" ]; then program=$word; break; fi      # what follows is its own
    # perhaps a program: it may lie elsewhere (--wdir), or be what another option takes
    case $taken/$word in yes/* | /-*) ;; *) program=$word ;; esac
    before=$word
done
if [ ! "$program" ]; then
    case $before in -np | --np | -n | --n) fail "$before: say how many ranks, a whole number from 1 on" ;; esac
    fail 'there is no program to start; name one, such as ./train_litespark'
fi
[ "$(id -u)" != 0 ] || root=--allow-run-as-root
interrupted=0
seen=1              # what the ranks are told: whether a terminal shows what they print
[ -t 1 ] && seen=terminal
stop() { kill -USR1 $job; kill -USR1 $watcher; }
interrupt() {
    now=$(date +%s)
    if [ $interrupted = 0 ]; then interrupted=$now; stop
    elif [ $((now - interrupted)) -ge 2 ]; then kill -TERM $job; fi
}
watch() {
    alone='' had_children='' again=''
    trap 'again=yes' USR1
    while sleep 5 >/dev/null 2>&1 && kill -0 $job 2>/dev/null; do
        [ ! "$again" ] || kill -USR1 $job
        again=''
        command -v ps >/dev/null || continue
        if ps -o stat= --ppid $job | grep -qv Z; then alone=0 had_children=yes; else alone=$((alone + 5)); fi
        [ "$had_children" ] && [ $alone -ge 20 ] || continue
        echo 'note | dev/run.sh: all ranks have ended and mpirun hangs: killed' >&2
        kill -KILL $job
    done
}
setsid mpirun $root --bind-to none -x LITESPARK_RUN=$seen "$@" </dev/null &
job=$!
watch &
watcher=$!
trap stop TERM HUP USR1
trap interrupt INT
while :; do         # a signal ends the wait, not the job
    wait $job
    status=$?
    kill -0 $job 2>/dev/null || break
done
kill $watcher 2>/dev/null
case $status in 132 | 137 | 255) status=1 ;; esac     # mpirun did not find the program; was killed; could not start ranks
exit $status

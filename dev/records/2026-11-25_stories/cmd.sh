#!/bin/sh
# From the project's folder: more stories than the default set, so that none is seen twice, and 2.5 times the default's steps.
make build/train_litespark build/stories
build/stories --out build/stories24 --train-tokens 24000000
OMP_NUM_THREADS=1 build/train_litespark --train-data 'build/stories24/train/train_*.ds' --val-data 'build/stories24/val/val_*.ds' --steps 6000 --out out_long

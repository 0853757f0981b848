# litespark. `make` lists the targets and what was found on this machine.
CC ?= gcc
CFLAGS ?= -O3 -march=native
WARN = -Wall -Wextra -Wshadow -Werror
SAN ?= 0

/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of init share.  It comes before any other header, for what it asks of the libc. */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64	/* glibc's stat(2) of 32 bits refuses files with larger inode numbers, as 9p has */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define SHARE "/mnt"	/* what dom0 exports: rootfs, and mounts/N for the bind mounts */

/* The exit status when a process cannot be started: a shell's, or that of runX and of what init itself has to do. */
enum { CANNOT_EXECUTE = 126, NOT_FOUND = 127, CANNOT_START = 255 };
enum { MESSAGE_MAX = 1024 };	/* bytes; a node of xenstore holds 2048 */

/* ---- init.c ---- */

/* A socket to the supervisor, in the process that becomes the container's: see await_process().  Elsewhere -1. */
extern int parent;
/* Of the process that this is about: 0 is the container's own, the others are those of `runX exec`. */
extern unsigned long process_number;

size_t join(char *buffer, size_t size, ...) __attribute__((sentinel));
char *decimal(unsigned long number);
void put(int fd, const char *text, size_t len);

/* All end the process and tell the user why: errno, or reason.  check() only if a system call's result is negative. */
void die_with(int status, const char *message) __attribute__((noreturn));
void die_as(int status, const char *operation, const char *object) __attribute__((noreturn));
void die(const char *operation, const char *object) __attribute__((noreturn));
void refuse(int reason, const char *operation, const char *object) __attribute__((noreturn));
int check(int result, const char *operation, const char *object);

int is_there(const char *path);
int write_at(int folder, const char *path, const char *value);

int64_t milliseconds(void);
int64_t in_seconds(int count);
int watch(const char *path, uint32_t events);
void await_event(int fd, int other, int64_t end, const char *sentence);

/* What a loop looks for: "while (it is not there) await_change(&awaited, end); end_watch(&awaited);". */
struct awaited {
	const char *sentence;	/* that says what is not there */
	const char *folder;	/* NULL, or where a file is made when it comes */
	const char *nodes[2];	/* of xenstore, NULL, or what changes when it comes */
	int is_watched, files, changes;
};
void await_change(struct awaited *it, int64_t end);
void end_watch(struct awaited *it);

enum { XS_DIRECTORY = 1, XS_READ = 2, XS_WATCH = 4, XS_WRITE = 11, XS_RM = 13, XS_ERROR = 16 };
enum { XS_PAYLOAD_MAX = 4096, XS_REPLY_MAX = XS_PAYLOAD_MAX + 1 };	/* bytes; the latter with a NUL */
int xs_request(uint32_t type, const char *path, const char *value, char *reply);
int xs_write(const char *path, const char *value);
int tell(const char *name, const char *value);
int tell_and_list(const char *name, const char *value, const char *folder, char *reply);
int ask(const char *name, char *reply);

void unblock_signals(void);
pid_t start_script(const char *path, const char *word);
int set_up(const char *word);

/* ---- doorbell.c ---- */

#define PROCESSES "/run/process"	/* a file for each that is to run: see note_process() */
#define BELL "/run/bell"		/* is there once the doorbell may act */

int note_process(unsigned long number, pid_t pid, pid_t supervisor);
int find_process(unsigned long number, pid_t *pid, pid_t *supervisor);
void forget_process(unsigned long number);
int doorbell_main(void);

/* ---- container.c ---- */

void *allocate(size_t count, size_t size);
unsigned long take_words(char *words, size_t size);
unsigned long load_config(void);
int open_cgroups(void);
void run_process(const sigset_t *before) __attribute__((noreturn));

/* ---- net.c ---- */

int net_main(void);

/* ---- streams.c ---- */

int open_console(unsigned long number, int64_t end);
void set_consoles(int input, int output, int errors);
void set_pipes(int input, int output, int errors);
void set_terminal(int master);
int is_withdrawn(void);
void await_word(int fd, pid_t pid);
int carry(pid_t pid, int signals);

/* ---- supervisor.c ---- */

int catch_signals(sigset_t *before);
pid_t start_process(unsigned long flags, const sigset_t *before, int *child);
int follow_process(pid_t pid, int child, int signals);
int supervise(void);

/* ---- exec.c ---- */

void join_container(void);
void supervise_exec(void) __attribute__((noreturn));
void report_end(int status, const char *error);
void end_exec(int status, const char *error) __attribute__((noreturn));

/* SPDX-License-Identifier: Apache-2.0 */
/* What init.c, container.c and streams.c share.  It comes before any other header, for what it asks of the libc. */
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

/* The container's own exit status when its process cannot be started: that of a shell. */
enum { CANNOT_EXECUTE = 126, NOT_FOUND = 127 };
enum { MESSAGE_MAX = 1024 };	/* bytes; a node of xenstore holds 2048 */

/* ---- init.c ---- */

/* A socket to the supervisor, in the process that becomes the container's: see await_process().  Elsewhere -1. */
extern int parent;

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

enum { XS_DIRECTORY = 1, XS_READ = 2, XS_WRITE = 11, XS_RM = 13, XS_ERROR = 16 };
enum { XS_PAYLOAD_MAX = 4096, XS_REPLY_MAX = XS_PAYLOAD_MAX + 1 };	/* bytes; the latter with a NUL */
int xs_request(uint32_t type, const char *path, const char *value, char *reply);
int xs_write(const char *path, const char *value);

void unblock_signals(void);
pid_t start_script(const char *path, const char *word);
int set_up(const char *word);

/* ---- container.c ---- */

unsigned long load_config(void);
void run_process(const sigset_t *before) __attribute__((noreturn));

/* ---- streams.c ---- */

int supervise(void);

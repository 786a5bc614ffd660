/* SPDX-License-Identifier: Apache-2.0 */
/* What the files share that make the container's process of runX's words for it. */
#include "init.h"

/* What needs nothing of the rootfs is done while the container is not started, as far as no other word is before it. */
enum when { EARLY, LATE };
enum { OPERANDS_MAX = 7 };

struct keyword {
	const char *keyword;	/* NULL ends a list */
	size_t operands;
	void (*apply)(char **word);
	enum when when;
};

/* ---- container.c ---- */

extern int init_root;	/* init's own "/", with busybox and a /proc that the container may not have */
extern char *next_word, *words_end;

char *concatenate(const char *first, const char *second, const char *third);
char *load(int fd, const char *path, size_t *size);
char *next(void);
uint64_t number(const char *word);
char **next_strings(void);
void write_proc(const char *path, const char *value);

/* ---- files.c ---- */

extern const struct keyword file_keywords[];
extern int init_run;	/* init's /run, in the container's mount namespace */

char *resolve(const char *path, int *missing);
int make(char *path, mode_t mode, dev_t device);
void enter_rootfs(void);

/* ---- process.c ---- */

extern const struct keyword process_keywords[];

void make_settings(size_t words);
void read_ahead(void);
void become_user(void);
void execute(const sigset_t *before) __attribute__((noreturn));

/* ---- hooks.c ---- */

extern const struct keyword hook_keywords[];
extern int hook_state;	/* a file with what they get on standard input, of which they need not read all; or -1 */

void run_hooks(const sigset_t *before);

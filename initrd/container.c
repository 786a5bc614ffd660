/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A process of the container, from runX's words for it to execve(2).  What it does is what the words in
 * /container/config, or those from a console, say, one after the other: NUL-terminated strings, flags of clone(2) for
 * the process's own namespaces, and then each keyword followed by its operands (at the ends of files.c, process.c and
 * hooks.c).  Memory is not given back, for execve(2) does that.
 */
#include "container.h"
#include <sys/stat.h>

#define CONFIG "/container/config"

int init_root;

/* ---- memory: nothing else asks the libc for any ---- */

/* Returns memory that is zeroed. */
void *allocate(size_t count, size_t size)
{
	void *memory = calloc(count, size);

	if (!memory)
		die("allocate", "memory");
	return memory;
}

char *concatenate(const char *first, const char *second, const char *third)
{
	size_t size = strlen(first) + strlen(second) + strlen(third) + 1;
	char *string = allocate(size, 1);

	join(string, size, first, second, third, NULL);
	return string;
}

/* The content of a regular file, and a NUL; *size without that. */
char *load(int fd, const char *path, size_t *size)
{
	struct stat st;
	char *content;

	check(fd, "open", path);
	check(fstat(fd, &st), "read", path);
	content = allocate(st.st_size + 1, 1);
	*size = check(read(fd, content, st.st_size), "read", path);
	close(fd);
	return content;
}

/* ---- words ---- */

char *next_word, *words_end;

char *next(void)
{
	char *word = next_word;

	if (word >= words_end)
		refuse(EPROTO, "read", "the words of the process");
	next_word += strlen(word) + 1;
	return word;
}

/* A negative one wraps around, so that it is itself again in a type with a sign. */
uint64_t number(const char *word)
{
	return strtoull(word, NULL, 10);
}

/* Strings after how many they are. */
char **next_strings(void)
{
	uint64_t count = number(next());
	char **strings = allocate(count + 1, sizeof *strings);

	for (uint64_t i = 0; i < count; i++)
		strings[i] = next();
	return strings;
}

/* words: with a NUL behind size bytes.  Returns the first, the flags of clone(2). */
unsigned long take_words(char *words, size_t size)
{
	size_t count = 0;

	next_word = words;
	words_end = words + size;
	for (char *end = next_word; end < words_end; end++)
		count += !*end;
	make_settings(count + 2);	/* no list has more than there are words, HOME and the end */
	return number(next());
}

unsigned long load_config(void)
{
	size_t size;
	char *words = load(open(CONFIG, O_RDONLY | O_CLOEXEC), CONFIG, &size);

	return take_words(words, size);
}

/* ---- files of init's own ---- */

void write_proc(const char *path, const char *value)
{
	int proc = check(openat(init_root, "proc", O_PATH | O_CLOEXEC), "open", "/proc");

	check(write_at(proc, path, value), "write", path);
	close(proc);
}

/* ---- from the supervisor's child to the process ---- */

/* Waits for the supervisor's word before that: the container's start. */
static void enter_container(void)
{
	static int entered;
	char byte;

	if (entered)
		return;
	if (read(parent, &byte, 1) != 1)
		_exit(CANNOT_START);
	if (process_number)
		join_container();
	else
		enter_rootfs();
	entered = 1;
}

static const struct keyword *find_keyword(const char *keyword)
{
	static const struct keyword *const lists[] = { file_keywords, process_keywords, hook_keywords };

	for (size_t i = 0; i < COUNT(lists); i++)
		for (const struct keyword *found = lists[i]; found->keyword; found++)
			if (!strcmp(keyword, found->keyword))
				return found;
	refuse(EPROTO, "apply", keyword);
}

static void apply_words(void)
{
	char *word[OPERANDS_MAX];

	while (next_word < words_end) {
		const struct keyword *keyword = find_keyword(next());
		for (size_t n = 0; n < keyword->operands; n++)
			word[n] = next();
		if (keyword->when == LATE)
			enter_container();
		keyword->apply(word);
	}
	enter_container();
}

enum { FILES_MAX = 64 };	/* init never has as many open, and the kernel gives the lowest number that is free */

/*
 * Links of /proc lead to what is open, and so out of the rootfs.  An image may name one as its program, or find it from
 * a hook; what is closed when the program is executed is closed too late.
 */
static void close_files(void)
{
	for (int fd = 3; fd < FILES_MAX; fd++)
		if (fd != parent && fd != hook_state)
			close(fd);
}

/* before: the signal mask that the process starts with. */
void run_process(const sigset_t *before)
{
	init_root = check(open("/", O_PATH | O_DIRECTORY | O_CLOEXEC), "open", "/");
	write_proc("self/oom_score_adj", "0");	/* init and this program are spared when memory runs out */
	apply_words();
	close_files();
	read_ahead();
	become_user();
	run_hooks(before);
	execute(before);
}

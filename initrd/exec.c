/* SPDX-License-Identifier: Apache-2.0 */
/*
 * `runX exec`: another process in the container.  The doorbell forks its supervisor, which is that of one process and
 * shares nothing with the container's own: it has consoles, nodes in xenstore and a file in /run/process of its number.
 */
#include "init.h"
#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>

enum { CONSOLE_WAIT = 30 };	/* seconds, for a console and for each part of the words */
enum { WORDS_MAX = 8 << 20 };	/* bytes; execve(2) takes 6 MiB at most */

static pid_t container;		/* the container's own process, by PID 1's namespace */

/* ---- into the container ---- */

/* Opens a file of /proc/PID of the container's process.  Returns -1 if there is none. */
static int open_of_container(const char *name)
{
	char path[64];

	join(path, sizeof path, "/proc/", decimal(container), "/", name, NULL);
	return open(path, O_RDONLY | O_CLOEXEC);
}

/*
 * lines: of /proc/PID/cgroup, behind an end of line; others than that of version 2 are of what the container has mounted.
 * Returns the file of the group's processes, or NULL.
 */
static char *find_group(char *lines)
{
	char *line = strstr(lines, "\n0::/");

	if (!line)
		return NULL;
	strcpy(line + 1 + strcspn(line + 1, "\n"), "/cgroup.procs");
	return line + sizeof "\n0::/" - 1;
}

/*
 * Into the group that init has made.  Where the container has made others below it, the kernel wants all processes in
 * those: then into that of the container's process.
 */
static void join_cgroup(void)
{
	int root = open_cgroups(), file;
	char lines[4096] = "\n", *path;

	if (root < 0 || write_at(root, "container/cgroup.procs", "0") == 0)
		return;
	if (errno == ENOENT)	/* it was to have none */
		return;
	file = check(open_of_container("cgroup"), "open", "the container's cgroup");
	if (errno != EBUSY || read(file, lines + 1, sizeof lines - 1 - sizeof "/cgroup.procs") < 0 ||
	    !(path = find_group(lines)))
		die("enter", "the container's cgroup");
	close(file);
	check(write_at(root, path, "0"), "enter the container's cgroup", path);
}

/*
 * The mount namespace is the last: it has another /proc.  A kernel may lack some kinds, and then we have none either.
 * Once the first thread of the container's process has ended there are none to be entered, as under runc.
 */
void join_container(void)
{
	static const char *const names[] = { "ns/cgroup", "ns/ipc", "ns/uts", "ns/net", "ns/mnt" };
	int namespaces[COUNT(names)];
	char own[64];

	join_cgroup();
	for (size_t i = 0; i < COUNT(names); i++) {
		namespaces[i] = open_of_container(names[i]);
		join(own, sizeof own, "/proc/self/", names[i], NULL);
		if (namespaces[i] < 0 && is_there(own))
			die("enter the container's", names[i]);
	}
	for (size_t i = 0; i < COUNT(names); i++)
		if (namespaces[i] >= 0)
			check(setns(namespaces[i], 0), "enter the container's", names[i]);
}

/* ---- from the host ---- */

static void read_console(int console, char *buffer, size_t size)
{
	struct pollfd fds = { console, POLLIN, 0 };

	while (size) {
		if (poll(&fds, 1, CONSOLE_WAIT * 1000) == 0)
			refuse(ETIMEDOUT, "read", "the words of the process");
		ssize_t n = read(console, buffer, size);
		if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
			end_exec(CANNOT_START, NULL);	/* the host has taken it away */
		buffer += n > 0 ? n : 0;
		size -= n > 0 ? n : 0;
	}
}

/* Tells the host that its words arrive as they are, and takes them. */
static void take_words_of(int console)
{
	unsigned char length[4];
	char *words;
	uint32_t size;

	check(write(console, "+", 1), "write", "to the console");
	read_console(console, (char *)length, sizeof length);
	size = length[0] | length[1] << 8 | length[2] << 16 | (uint32_t)length[3] << 24;
	if (size > WORDS_MAX)
		refuse(E2BIG, "read", "the words of the process");
	words = allocate(size + 1, 1);
	read_console(console, words, size);
	take_words(words, size);
}

static int is_announced(unsigned long console)
{
	char path[64], reply[XS_REPLY_MAX];

	join(path, sizeof path, "device/console/", decimal(console), "/state", NULL);
	return xs_request(XS_READ, path, "", reply) >= 0;
}

/* ---- the supervisor ---- */

/* Forks in the container's PID namespace; the supervisor itself stays in PID 1's, for what else it may fork. */
static pid_t start_in_container(const sigset_t *before, int *child)
{
	int theirs = open_of_container("ns/pid"), ours = open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC);
	pid_t pid;

	if (theirs >= 0)
		check(setns(theirs, CLONE_NEWPID), "enter the container's", "ns/pid");
	pid = start_process(0, before, child);
	if (theirs >= 0)
		check(setns(ours, CLONE_NEWPID), "leave the container's", "ns/pid");
	close(theirs);
	close(ours);
	return pid;
}

void supervise_exec(void)
{
	unsigned long number = 2 * process_number + 1;
	int64_t end = in_seconds(CONSOLE_WAIT);
	int console, output, signals, child;
	pid_t supervisor, pid;
	sigset_t before;

	note_process(process_number, 0, getpid());
	write_at(AT_FDCWD, "/proc/self/oom_score_adj", "-1000");	/* it is spared, as init is */
	prctl(PR_SET_DUMPABLE, 0);	/* none of the container's is to reach init's files by what it forks */
	signals = catch_signals(&before);
	console = open_console(number, end);
	output = check(fcntl(console, F_DUPFD_CLOEXEC, 0), "open", "the console");
	/* a terminal has no second one */
	set_consoles(console, output, is_announced(number + 1) ? open_console(number + 1, end) : -1);
	take_words_of(console);
	if (find_process(0, &container, &supervisor) < 0 || !container)
		refuse(ESRCH, "execute in", "the container");
	pid = start_in_container(&before, &child);
	end_exec(follow_process(pid, child, signals), NULL);
}

/* error: a sentence, or NULL. */
void report_end(int status, const char *error)
{
	forget_process(process_number);
	if (error)
		tell("error", error);
	tell("exit", decimal(status));
}

void end_exec(int status, const char *error)
{
	report_end(status, error);
	_exit(0);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The doorbell.  The kernel runs it, in PID 1's root and with no open files, each time the host writes "poweroff" to
 * control/shutdown.  What the host asks for stands in data/request, a node each, in order:
 *
 *	kill N SIGNAL		the process N, of which 0 is the container's own
 *	killall 0 SIGNAL	all that lives in the container
 *	look N			the supervisor of N looks at what the host has written for it
 *	run N			another process
 *	cpus			as many processors as there are
 *
 * Removing a node claims it.  What is asked of a process that is still to be executed stays, for who executes it looks
 * at the queue then; what is asked of one that has ended is dropped.
 */
#include "init.h"
#include <dirent.h>
#include <poll.h>
#include <stdio.h>	/* rename(2) */
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>

enum { FORMER_WAIT = 1000 };	/* milliseconds */

/* ---- the processes: /run/process/N holds "PID SUPERVISOR", of PID 1's namespace; PID 0: not executed yet ---- */

static void process_path(char path[64], unsigned long number, const char *suffix)
{
	join(path, 64, PROCESSES "/", decimal(number), suffix, NULL);
}

/* Returns 0, or -1.  Who reads it gets all of it or what was there before. */
int note_process(unsigned long number, pid_t pid, pid_t supervisor)
{
	char path[64], made[64], text[64];
	size_t len = join(text, sizeof text, decimal(pid), " ", decimal(supervisor), "\n", NULL);
	int fd;
	ssize_t n;

	process_path(path, number, "");
	process_path(made, number, ".new");
	fd = open(made, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0)
		return -1;
	n = write(fd, text, len);
	close(fd);
	return n < 0 ? -1 : rename(made, path);
}

/* Returns 0, or -1: it is not there. */
int find_process(unsigned long number, pid_t *pid, pid_t *supervisor)
{
	char path[64], text[64] = "", *rest;
	int fd;

	process_path(path, number, "");
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || read(fd, text, sizeof text - 1) < 0)
		*text = 0;
	close(fd);
	*pid = strtoul(text, &rest, 10);
	*supervisor = strtoul(rest, NULL, 10);
	return *text ? 0 : -1;
}

void forget_process(unsigned long number)
{
	char path[64];

	process_path(path, number, "");
	unlink(path);
}

/* ---- requests ---- */

static int lock;	/* for the bell: who comes later waits, so that all is done in order */

/* One of the same number that is still there is of a `runX exec` that is no more: it must not speak for the next. */
static void end_former(unsigned long number)
{
	pid_t pid, supervisor;
	struct pollfd ended = { -1, POLLIN, 0 };

	if (find_process(number, &pid, &supervisor) < 0 || !supervisor)
		return;
	ended.fd = syscall(SYS_pidfd_open, supervisor, 0);
	kill(supervisor, SIGKILL);
	if (pid)
		kill(pid, SIGKILL);
	poll(&ended, ended.fd >= 0, FORMER_WAIT);
	close(ended.fd);
}

static void run(unsigned long number)
{
	char message[MESSAGE_MAX];
	pid_t supervisor;

	end_former(number);
	note_process(number, 0, 0);
	supervisor = fork();
	if (supervisor > 0)
		return;
	process_number = number;
	if (supervisor == 0) {
		close(lock);
		supervise_exec();
	}
	join(message, sizeof message, "fork a supervisor: ", strerror(errno), NULL);
	report_end(CANNOT_START, message);	/* what else is asked for may still be possible */
	process_number = 0;
}

/* The container is what lives in another mount namespace than init, or has none as its first thread has ended. */
static void kill_all(int signal)
{
	DIR *proc = opendir("/proc");
	struct stat own, other;
	char path[64];

	if (!proc || stat("/proc/self/ns/mnt", &own) < 0)
		return;
	for (struct dirent *entry; (entry = readdir(proc));) {
		pid_t pid = strtoul(entry->d_name, NULL, 10);
		join(path, sizeof path, "/proc/", entry->d_name, "/ns/mnt", NULL);
		if (pid && (stat(path, &other) < 0 || other.st_ino != own.st_ino))
			kill(pid, signal);
	}
	closedir(proc);
}

/* The kernel finds a new processor by itself, and leaves it to userspace to switch it on. */
static void use_all_cpus(void)
{
	DIR *cpus;
	char path[64];

	mount("sys", "/sys", "sysfs", 0, NULL);
	if ((cpus = opendir("/sys/devices/system/cpu"))) {
		for (struct dirent *entry; (entry = readdir(cpus));) {
			join(path, sizeof path, entry->d_name, "/online", NULL);
			if (!strncmp(path, "cpu", 3))
				write_at(dirfd(cpus), path, "1");
		}
		closedir(cpus);
	}
	umount("/sys");
}

/* Whether it is to stay in the queue: the process is there, and not executed yet. */
static int is_early(const char *verb, unsigned long number)
{
	pid_t pid, supervisor;

	return (!strcmp(verb, "kill") || !strcmp(verb, "killall") || !strcmp(verb, "look")) &&
	       find_process(number, &pid, &supervisor) == 0 && !pid;
}

static void act(const char *verb, unsigned long number, int signal)
{
	pid_t pid, supervisor;

	if (!strcmp(verb, "cpus")) {
		use_all_cpus();
	} else if (!strcmp(verb, "run")) {
		run(number);
	} else if (find_process(number, &pid, &supervisor) < 0) {
		return;
	} else if (!strcmp(verb, "kill")) {
		kill(pid, signal);
	} else if (!strcmp(verb, "killall")) {
		kill_all(signal);
	} else if (!strcmp(verb, "look")) {
		kill(supervisor, SIGWINCH);
	}
}

static void answer(const char *name)
{
	char path[128], request[XS_REPLY_MAX], reply[XS_REPLY_MAX];
	const char *words[3] = { "", "", "" };
	int n = 0;

	join(path, sizeof path, "data/request/", name, NULL);
	if (xs_request(XS_READ, path, "", request) < 0)
		return;
	for (char *word = strtok(request, " "); word && n < 3; word = strtok(NULL, " "))
		words[n++] = word;
	unsigned long number = strtoul(words[1], NULL, 10);
	if (!is_early(words[0], number) && xs_request(XS_RM, path, "", reply) >= 0)
		act(words[0], number, strtoul(words[2], NULL, 10));
}

static int compare(const void *left, const void *right)
{
	return strcmp(*(char *const *)left, *(char *const *)right);
}

int doorbell_main(void)
{
	static char list[XS_REPLY_MAX], *names[XS_REPLY_MAX / 2];
	size_t count = 0;
	int len;

	for (int fd = 0; fd <= 2; fd++)
		if (fcntl(fd, F_GETFD) < 0)
			dup2(open(fd ? "/dev/hvc0" : "/dev/null", O_RDWR | O_NOCTTY), fd);
	lock = open(BELL, O_RDWR | O_CLOEXEC);
	if (lock < 0 || flock(lock, LOCK_EX) < 0)
		return 1;	/* init is not that far, and will look */
	len = xs_request(XS_DIRECTORY, "data/request", "", list);
	for (int at = 0; at < len; at += strlen(list + at) + 1)
		names[count++] = list + at;
	qsort(names, count, sizeof *names, compare);
	for (size_t i = 0; i < count; i++)
		answer(names[i]);
	return 0;
}

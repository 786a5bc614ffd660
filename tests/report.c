/* SPDX-License-Identifier: Apache-2.0 */
/*
 * report [PATH...]: prints, as one JSON object, what a process sees of itself and of each PATH.
 *
 * The tests run it under runc and under runX and compare.  It is static, so that a rootfs needs nothing else.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

extern char **environ;

static const char *separator = "";

static void string(const char *text)
{
	putchar('"');
	for (; *text; text++)
		if (*text == '"' || *text == '\\' || (unsigned char)*text < 0x20)
			printf("\\u%04x", (unsigned char)*text);
		else
			putchar(*text);
	putchar('"');
}

static void key(const char *name)
{
	printf("%s\n", separator);
	string(name);
	printf(": ");
	separator = ",";
}

static void number(const char *name, long long value)
{
	key(name);
	printf("%lld", value);
}

static void open_list(const char *name)
{
	key(name);
	printf("[");
	separator = "";
}

static void item(const char *text)
{
	printf("%s", separator);
	string(text);
	separator = ", ";
}

static void close_list(void)
{
	printf("]");
	separator = ",";
}

/* A file's lines, a string each; none if it cannot be read. */
static void lines(const char *name, const char *path)
{
	char *line = NULL;
	size_t size = 0;
	FILE *file = fopen(path, "re");

	open_list(name);
	while (file && getline(&line, &size, file) > 0) {
		line[strcspn(line, "\n")] = 0;
		item(line);
	}
	close_list();
	if (file)
		fclose(file);
}

static void capabilities(void)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];
	unsigned long long bounding = 0, ambient = 0;

	syscall(SYS_capget, &header, data);
	for (int cap = 0; cap < 41; cap++) {
		bounding |= (unsigned long long)(prctl(PR_CAPBSET_READ, cap, 0, 0, 0) == 1) << cap;
		ambient |= (unsigned long long)(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0) == 1) << cap;
	}
	number("effective", data[0].effective | (long long)data[1].effective << 32);
	number("permitted", data[0].permitted | (long long)data[1].permitted << 32);
	number("inheritable", data[0].inheritable | (long long)data[1].inheritable << 32);
	number("bounding", bounding);
	number("ambient", ambient);
	number("no new privileges", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
	number("seccomp", prctl(PR_GET_SECCOMP, 0, 0, 0, 0));
}

static void ids(void)
{
	gid_t groups[64];
	int count = getgroups(64, groups);
	mode_t mask = umask(0);
	char text[32];

	umask(mask);
	number("uid", getuid());
	number("euid", geteuid());
	number("gid", getgid());
	number("egid", getegid());
	number("umask", mask);
	open_list("groups");
	for (int i = 0; i < count; i++) {
		snprintf(text, sizeof text, "%u", groups[i]);
		item(text);
	}
	close_list();
	number("pid", getpid());
	number("parent", getppid());
	number("session", getsid(0));
}

static void limits(void)
{
	struct rlimit limit;
	char text[64];

	open_list("limits");
	for (int resource = 0; resource < RLIM_NLIMITS; resource++) {
		getrlimit(resource, &limit);
		snprintf(text, sizeof text, "%lld %lld", (long long)limit.rlim_cur, (long long)limit.rlim_max);
		item(text);
	}
	close_list();
}

static void signals(void)
{
	sigset_t blocked;
	struct sigaction action;
	char text[8];

	sigprocmask(SIG_SETMASK, NULL, &blocked);
	open_list("signals blocked or ignored");
	for (int number = 1; number < 65; number++)
		if (sigismember(&blocked, number) == 1 ||
		    (sigaction(number, NULL, &action) == 0 && action.sa_handler == SIG_IGN)) {
			snprintf(text, sizeof text, "%d", number);
			item(text);
		}
	close_list();
}

static void file(const char *path)
{
	char text[256] = "", link[128] = "";
	struct stat st;
	int fd;

	key(path);
	if (lstat(path, &st) < 0) {
		string(strerrorname_np(errno));
		return;
	}
	if (S_ISLNK(st.st_mode))
		readlink(path, link, sizeof link - 1);
	else if (S_ISDIR(st.st_mode)) {	/* whether something can be made in it */
		fd = openat(AT_FDCWD, path, O_TMPFILE | O_RDWR, 0600);
		if (fd < 0 && errno == EOPNOTSUPP && chdir(path) == 0)
			fd = open("report.new", O_CREAT | O_RDWR, 0600);
		snprintf(link, sizeof link, "%s", fd < 0 ? strerrorname_np(errno) : "writable");
	} else if (S_ISREG(st.st_mode)) {
		fd = open(path, O_RDONLY);
		snprintf(link, sizeof link, "%s", fd < 0 ? strerrorname_np(errno) : "readable");
	}
	snprintf(text, sizeof text, "%o %u:%u %u:%u %s", st.st_mode, st.st_uid, st.st_gid,
		 major(st.st_rdev), minor(st.st_rdev), link);
	string(text);
}

int main(int argc, char **argv)
{
	char text[256];
	struct sched_param parameter;

	printf("{");
	ids();
	capabilities();
	limits();
	signals();
	getcwd(text, sizeof text);
	open_list("cwd");
	item(text);
	close_list();
	open_list("env");
	for (char **variable = environ; *variable; variable++)
		item(*variable);
	close_list();
	number("io priority", syscall(SYS_ioprio_get, 1, 0));
	number("scheduler", sched_getscheduler(0));
	sched_getparam(0, &parameter);
	number("priority", parameter.sched_priority);
	number("nice", getpriority(PRIO_PROCESS, 0));
	number("personality", personality(0xffffffff));
	lines("oom", "/proc/self/oom_score_adj");
	lines("hostname", "/proc/sys/kernel/hostname");
	lines("domainname", "/proc/sys/kernel/domainname");
	lines("shm_rmid_forced", "/proc/sys/kernel/shm_rmid_forced");
	lines("ping_group_range", "/proc/sys/net/ipv4/ping_group_range");
	lines("cgroup", "/proc/self/cgroup");
	lines("pids.max", "/sys/fs/cgroup/pids.max");
	lines("cgroup.type", "/sys/fs/cgroup/cgroup.type");
	lines("mounts", "/proc/self/mountinfo");
	for (int i = 1; i < argc; i++)
		file(argv[i]);
	printf("\n}\n");
	return 0;
}

/* SPDX-License-Identifier: Apache-2.0 */
/* What a process is given: its cgroup, limits, user, capabilities, seccomp filter, environment; and its execution. */
#include "container.h"
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

static struct {
	char **args, **env;
	const char *cwd;
	size_t n_args, n_env, n_groups;
	gid_t *groups, gid;
	uid_t uid;
	mode_t umask;
	uint64_t bounding, effective, inheritable, permitted, ambient;	/* capabilities, a bit each */
	int no_new_privileges;
	struct sock_fprog filter;	/* seccomp(2); len 0: none */
	unsigned long filter_flags;
} settings = { .cwd = "/", .umask = 022 };

/* words: how many there are at most in any list. */
void make_settings(size_t words)
{
	settings.args = allocate(words, sizeof *settings.args);
	settings.env = allocate(words, sizeof *settings.env);
	settings.groups = allocate(words, sizeof *settings.groups);
}

/* ---- what the process is given ---- */

/* <linux/mount.h>, which does not go with every libc's <sys/mount.h>; some of those have it all. */
#ifndef FSOPEN_CLOEXEC
enum { FSOPEN_CLOEXEC = 1, FSMOUNT_CLOEXEC = 1, FSCONFIG_CMD_CREATE = 6 };
#endif

/* The root of all control groups, at no path: a mount that only we have open.  -1: the kernel has none. */
int open_cgroups(void)
{
	int fs = syscall(SYS_fsopen, "cgroup2", FSOPEN_CLOEXEC), root = -1;

	if (fs >= 0 && syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
		root = syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0);
	if (fs >= 0)
		close(fs);
	return root;
}

/*
 * A group for the container, which is the root of its cgroup namespace: the kernel's own root has no limits.  Pairs of
 * file and value follow.
 */
static void apply_cgroup(char **word)
{
	static const char *const controllers[] = { "+cpu", "+cpuset", "+hugetlb", "+io", "+memory", "+pids" };
	int root = check(open_cgroups(), "mount", "cgroup2"), group;

	for (size_t i = 0; i < COUNT(controllers); i++)
		write_at(root, "cgroup.subtree_control", controllers[i]);	/* the kernel may lack it */
	if (mkdirat(root, "container", 0755) < 0 || (group = openat(root, "container", O_PATH | O_CLOEXEC)) < 0)
		die("make", "the cgroup");
	for (uint64_t left = number(word[0]); left; left--) {
		char *file = next(), *value = next();
		if (write_at(group, file, value) < 0 && (errno != ENOENT || strncmp(file, "hugetlb.", 8)))
			die("set the cgroup's", file);	/* a kernel without huge pages limits them to none */
	}
	if (write_at(group, "cgroup.procs", "0") < 0 || unshare(CLONE_NEWCGROUP) < 0)
		die("enter", "the cgroup");
}

static void apply_personality(char **word)
{
	check(personality(number(word[0])), "set", "the personality");
}

static void apply_sysctl(char **word)
{
	write_proc(word[0], word[1]);
}

static void apply_hostname(char **word)
{
	check(sethostname(word[0], strlen(word[0])), "sethostname", word[0]);
}

static void apply_domainname(char **word)
{
	check(setdomainname(word[0], strlen(word[0])), "setdomainname", word[0]);
}

static void apply_rlimit(char **word)
{
	struct rlimit limit = { number(word[1]), number(word[2]) };

	check(setrlimit(number(word[0]), &limit), "set rlimit", word[0]);
}

static void apply_oom(char **word)
{
	write_proc("self/oom_score_adj", word[0]);
}

static void apply_ioprio(char **word)
{
	check(syscall(SYS_ioprio_set, 1, 0, (int)number(word[0])), "set", "the I/O priority");	/* IOPRIO_WHO_PROCESS */
}

static void apply_scheduler(char **word)
{
	struct {	/* sched_attr of <linux/sched/types.h>, which not every libc has */
		uint32_t size, policy;
		uint64_t flags;
		int32_t nice;
		uint32_t priority;
		uint64_t runtime, deadline, period;
	} attr = {
		sizeof attr, number(word[0]), number(word[1]), number(word[2]), number(word[3]),
		number(word[4]), number(word[5]), number(word[6]),
	};

	check(syscall(SYS_sched_setattr, 0, &attr, 0), "set", "the scheduler");
}

static void apply_user(char **word)
{
	settings.uid = number(word[0]);
	settings.gid = number(word[1]);
	settings.umask = number(word[2]);
}

static void apply_group(char **word)
{
	settings.groups[settings.n_groups++] = number(word[0]);
}

static void apply_capabilities(char **word)
{
	settings.bounding = number(word[0]);
	settings.effective = number(word[1]);
	settings.inheritable = number(word[2]);
	settings.permitted = number(word[3]);
	settings.ambient = number(word[4]);
}

static void apply_no_new_privileges(char **none)
{
	(void)none;
	settings.no_new_privileges = 1;
}

/*
 * A system call's number by its name, "-name" for 32-bit programs; one that does not exist if it is not known.  The
 * file is sorted, and so, nearly, is what is looked up: the search goes on where the last one has ended.
 */
static uint32_t find_syscall(const char *name)
{
	static char *table, *place;
	size_t len = strlen(name), size;

	if (!table)
		place = table = load(openat(init_root, "etc/syscalls", O_RDONLY | O_CLOEXEC), "/etc/syscalls", &size);
	for (int turn = 0; turn < 2; turn++, place = table)
		for (; *place; place = strchr(place, '\n') + 1)
			if (!strncmp(place, name, len) && place[len] == ' ')
				return strtoul(place + len, NULL, 10);
	return UINT32_MAX;
}

/*
 * The instructions follow: code jt jf k.  k may be the name of a system call; "max" and "-max": the highest of those,
 * for what is newer.
 */
static void apply_seccomp(char **word)
{
	struct sock_filter *insn, *newer[2] = { NULL, NULL };
	uint32_t highest[2] = { 0, 0 };

	settings.filter_flags = number(word[0]);
	settings.filter.len = number(word[1]);
	settings.filter.filter = insn = allocate(settings.filter.len, sizeof *insn);
	for (int left = settings.filter.len; left; left--, insn++) {
		insn->code = number(next());
		insn->jt = number(next());
		insn->jf = number(next());
		char *operand = next();
		int compat = *operand == '-';
		if (*operand >= '0' && *operand <= '9') {
			insn->k = number(operand);
		} else if (!strcmp(operand + compat, "max")) {
			newer[compat] = insn;
		} else {
			insn->k = find_syscall(operand);
			if (insn->k != UINT32_MAX && insn->k > highest[compat])
				highest[compat] = insn->k;
		}
	}
	for (int compat = 0; compat < 2; compat++)
		if (newer[compat])
			newer[compat]->k = highest[compat];
}

static void apply_cwd(char **word)
{
	int missing = 0;
	char *folder = process_number ? NULL : resolve(word[0], &missing);

	settings.cwd = word[0];
	if (missing)
		make(folder, S_IFDIR | 0755, 0);
}

static void apply_arg(char **word)
{
	settings.args[settings.n_args++] = word[0];
}

static void apply_env(char **word)
{
	settings.env[settings.n_env++] = word[0];
}

const struct keyword process_keywords[] = {
	{ "cgroup", 1, apply_cgroup, EARLY },			/* n (file value)... */
	{ "sysctl", 2, apply_sysctl, LATE },			/* path below /proc, value */
	{ "hostname", 1, apply_hostname, EARLY },		/* name */
	{ "domainname", 1, apply_domainname, EARLY },		/* name */
	{ "rlimit", 3, apply_rlimit, LATE },			/* resource soft hard */
	{ "oom", 1, apply_oom, LATE },				/* adjustment */
	{ "ioprio", 1, apply_ioprio, LATE },			/* class << 13 | priority */
	{ "scheduler", 7, apply_scheduler, LATE },		/* policy flags nice priority runtime deadline period */
	{ "user", 3, apply_user, EARLY },			/* uid gid umask */
	{ "group", 1, apply_group, EARLY },			/* gid */
	{ "capabilities", 5, apply_capabilities, EARLY },	/* bounding effective inheritable permitted ambient */
	{ "no_new_privileges", 0, apply_no_new_privileges, EARLY },
	{ "personality", 1, apply_personality, LATE },		/* persona of personality(2) */
	{ "seccomp", 2, apply_seccomp, EARLY },			/* flags n (code jt jf k)... */
	{ "cwd", 1, apply_cwd, LATE },				/* path */
	{ "arg", 1, apply_arg, EARLY },				/* string */
	{ "env", 1, apply_env, EARLY },				/* NAME=value */
	{ NULL, 0, NULL, LATE }
};

/* ---- the end: it becomes the program ---- */

enum { PASSWD_MAX = 16 << 20 };	/* bytes; the image may have anything there */

/* The user's home folder by the rootfs' passwd(5), "/" if it has none there. */
static const char *find_home(void)
{
	static const char path[] = "/etc/passwd";
	int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	char *uid = decimal(settings.uid), *text, *line;
	struct stat st;
	size_t size;

	if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || st.st_size > PASSWD_MAX)
		return "/";
	text = load(fd, path, &size);
	while ((line = strsep(&text, "\n"))) {
		char *fields[6];
		int n = 0;

		while (n < 6 && (fields[n] = strsep(&line, ":")))
			n++;
		if (n == 6 && !strcmp(fields[2], uid))	/* the shell may be missing */
			return *fields[5] ? fields[5] : "/";
	}
	return "/";
}

/* HOME is the user's where config.json sets none, or an empty one, as runc does. */
static void set_home(void)
{
	char **home = settings.env;

	while (*home && strncmp(*home, "HOME=", 5))
		home++;
	if (!*home || !(*home)[5])
		*home = concatenate("HOME=", find_home(), "");
}

static void set_capabilities(void)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];

	for (int half = 0; half < 2; half++)
		data[half] = (struct __user_cap_data_struct){
			settings.effective >> 32 * half, settings.permitted >> 32 * half,
			settings.inheritable >> 32 * half,
		};
	check(syscall(SYS_capset, &header, data), "set", "the capabilities");
	for (int cap = 0; cap < 64; cap++)
		if (settings.ambient >> cap & 1)
			check(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0), "raise capability", decimal(cap));
}

/* The filter holds for what is left to do here too. */
static void install_filter(void)
{
	if (settings.filter.len)
		check(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, settings.filter_flags, &settings.filter),
		      "install", "the seccomp filter");
}

/* As runc has it, whose words begin small, as all of Go's. */
static void die_in_words(int status, const char *operation, const char *reason) __attribute__((noreturn));
static void die_in_words(int status, const char *operation, const char *reason)
{
	char message[MESSAGE_MAX];
	size_t len = join(message, sizeof message, operation, ": ", NULL);

	join(message + len, sizeof message - len, reason, NULL);
	if (message[len] >= 'A' && message[len] <= 'Z')
		message[len] += 'a' - 'A';
	die_with(status, message);
}

/* Links of /proc, which an image may name as its working directory, lead to what init has open: out of the rootfs. */
static int is_inside(void)
{
	char path[PATH_MAX];

	return syscall(SYS_getcwd, path, sizeof path) > 0 && *path == '/';
}

static void enter_cwd(void)
{
	char operation[MESSAGE_MAX];
	int entered = chdir(settings.cwd) == 0;

	if (entered && is_inside())
		return;
	join(operation, sizeof operation, "chdir to cwd (\"", settings.cwd, "\") set in config.json failed", NULL);
	die_in_words(CANNOT_EXECUTE, operation, entered ? "it is outside of the container" : strerror(errno));
}

enum { AHEAD_MAX = 2 << 20, AHEAD_STEP = 128 << 10 };	/* bytes; the kernel takes no more at once */

/* Has the kernel read the beginning of a regular file meanwhile.  Returns whether it is one. */
static int read_file_ahead(const char *path)
{
	struct stat st;
	int fd;

	if (stat(path, &st) < 0 || !S_ISREG(st.st_mode) || (fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC)) < 0)
		return 0;	/* it may be a fifo by now */
	for (off_t at = 0; at < st.st_size && at < AHEAD_MAX; at += AHEAD_STEP)
		posix_fadvise(fd, at, AHEAD_STEP, POSIX_FADV_WILLNEED);
	close(fd);
	return 1;
}

/* The program, so that it need not ask the host for one piece after the other.  Whether it is there is not judged. */
void read_ahead(void)
{
	const char *name = settings.args[0], *path = "";
	char *left, *folder;

	if (!name || strchr(name, '/')) {
		if (name && *name == '/')
			read_file_ahead(name);
		return;
	}
	for (char **variable = settings.env; *variable; variable++)
		if (!strncmp(*variable, "PATH=", 5))
			path = *variable + 5;
	for (left = concatenate(path, "", ""); (folder = strsep(&left, ":"));)
		if (*folder == '/' && read_file_ahead(concatenate(folder, "/", name)))
			return;
}

/* The order is capabilities(7)'s: the bounding set while we may, the rest once the user is what it will be. */
void become_user(void)
{
	/* as root, where the user cannot; the other way round later */
	int entered = chdir(settings.cwd) == 0 && is_inside();

	set_home();
	environ = settings.env;
	umask(settings.umask);
	for (int fd = 0; fd <= 2; fd++)	/* so that the user may open /dev/stdout again, as under runc */
		check(fchown(fd, settings.uid, -1), "chown", "a standard stream");
	for (int cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
		if (!(settings.bounding >> cap & 1))
			check(prctl(PR_CAPBSET_DROP, cap, 0, 0, 0), "drop capability", decimal(cap));
	if (!settings.no_new_privileges)	/* while we have CAP_SYS_ADMIN */
		install_filter();
	check(prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0), "keep", "the capabilities");
	if (setgroups(settings.n_groups, settings.groups) < 0 || setgid(settings.gid) < 0 || setuid(settings.uid) < 0)
		die("set", "the user and group ids");
	if (!entered)
		enter_cwd();
	check(prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0), "keep", "the capabilities");
	set_capabilities();
	if (!settings.no_new_privileges)
		return;
	check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "set", "no new privileges");
	install_filter();
}

/* path: that was to be found, or NULL. */
static void fail_exec(int status, const char *path, const char *reason) __attribute__((noreturn));
static void fail_exec(int status, const char *path, const char *reason)
{
	char operation[MESSAGE_MAX];

	join(operation, sizeof operation, "exec: \"", settings.args[0], "\"", path ? ": stat " : "", path ? path : "",
	     NULL);
	die_in_words(status, operation, reason);
}

/*
 * As runc and not by execvp(3), which goes past a file that somebody else may execute, or whose interpreter is missing,
 * looks in the working directory, and knows a PATH where there is none.  Nothing else before, for the filter holds.
 */
void execute(const sigset_t *before)
{
	const char *name = settings.args[0], *path = getenv("PATH");
	char *left = path && *path ? concatenate(path, "", "") : NULL, *folder;
	struct stat st;

	if (!name)
		refuse(EPROTO, "execute", "no program");
	sigprocmask(SIG_SETMASK, before, NULL);
	if (strchr(name, '/')) {
		execv(name, settings.args);
		int status = errno == ENOENT ? NOT_FOUND : CANNOT_EXECUTE, reason = errno, missing = stat(name, &st);
		fail_exec(status, missing ? name : NULL, strerror(missing ? errno : reason));
	}
	while ((folder = strsep(&left, ":"))) {
		size_t len = strlen(folder);
		const char *file = concatenate(*folder ? folder : ".", len && folder[len - 1] == '/' ? "" : "/", name);
		int relative = *file != '/', reason = relative || execv(file, settings.args) == 0 ? ENOENT : errno;
		int found = stat(file, &st) == 0 && !S_ISDIR(st.st_mode) && st.st_mode & 0111;
		if (found && relative)
			fail_exec(CANNOT_EXECUTE, NULL, "cannot run executable found relative to current directory");
		if (found || (reason != ENOENT && reason != ENOTDIR && reason != EACCES && reason != ELOOP &&
			      reason != ENAMETOOLONG))
			fail_exec(reason == ENOENT ? NOT_FOUND : CANNOT_EXECUTE, NULL, strerror(reason));
	}
	fail_exec(NOT_FOUND, NULL, "executable file not found in $PATH");
}

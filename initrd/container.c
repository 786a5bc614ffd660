/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The container's process, from runX's words for it to execve(2).  What it does is what the words in /container/config
 * say, one after the other: NUL-terminated strings, flags of clone(2) for the process's own namespaces, and then each
 * keyword followed by its operands (see keywords[]).  Memory is not given back, for execve(2) does that.
 */
#include "init.h"
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <sys/xattr.h>

#define CONFIG "/container/config"

static int init_root;	/* init's own "/", with busybox and a /proc that the container may not have */
static int init_run;	/* its /run, in the container's mount namespace */

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

struct hook {
	unsigned long timeout;	/* seconds, 0: none */
	char *path, **args, **env;	/* no env: the process's */
};

static struct hook *hooks;
static size_t n_hooks;
static int hook_state = -1;	/* a file with what they get on standard input, of which they need not read all */

/* ---- memory: nothing else asks the libc for any ---- */

/* Returns memory that is zeroed. */
static void *allocate(size_t count, size_t size)
{
	void *memory = calloc(count, size);

	if (!memory)
		die("allocate", "memory");
	return memory;
}

static char *concatenate(const char *first, const char *second, const char *third)
{
	size_t size = strlen(first) + strlen(second) + strlen(third) + 1;
	char *string = allocate(size, 1);

	join(string, size, first, second, third, NULL);
	return string;
}

/* The content of a regular file, and a NUL; *size without that. */
static char *load(int fd, const char *path, size_t *size)
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

static char *next_word, *words_end;

static char *next(void)
{
	char *word = next_word;

	if (word >= words_end)
		refuse(EPROTO, "read", CONFIG);
	next_word += strlen(word) + 1;
	return word;
}

/* A negative one wraps around, so that it is itself again in a type with a sign. */
static uint64_t number(const char *word)
{
	return strtoull(word, NULL, 10);
}

/* Strings after how many they are. */
static char **next_strings(void)
{
	uint64_t count = number(next());
	char **strings = allocate(count + 1, sizeof *strings);

	for (uint64_t i = 0; i < count; i++)
		strings[i] = next();
	return strings;
}

unsigned long load_config(void)
{
	size_t size, count = 0;

	next_word = load(open(CONFIG, O_RDONLY | O_CLOEXEC), CONFIG, &size);
	words_end = next_word + size;
	for (char *end = next_word; end < words_end; end++)
		count += !*end;
	settings.args = allocate(count, sizeof *settings.args);	/* no list has as many as there are words */
	settings.env = allocate(count, sizeof *settings.env);
	settings.groups = allocate(count, sizeof *settings.groups);
	hooks = allocate(count, sizeof *hooks);
	return number(next());
}

/* ---- paths ---- */

enum { LINKS_MAX = 40 };	/* of one path, as the kernel has it */

/*
 * Where a path leads, by names that are no links: mkdir(2) and mount(2) do not go where a link leads to nothing.  Names
 * that are missing count as folders.  "/" is the container's, so no link leads out.  *missing: whether it is not there.
 */
static char *resolve(const char *path, int *missing)
{
	char *found = allocate(PATH_MAX, 1), *left = concatenate(path, "", ""), *name, link[PATH_MAX];
	size_t len = 0, links = 0;

	*missing = 0;
	while ((name = strsep(&left, "/"))) {
		size_t above = len;
		if (!*name || !strcmp(name, "."))
			continue;
		if (!strcmp(name, "..")) {
			while (len && found[--len] != '/')
				;
			found[len] = 0;
			*missing = len && !is_there(found);
			continue;
		}
		if (len + strlen(name) + 2 > PATH_MAX)
			refuse(ENAMETOOLONG, "follow", path);
		len += join(found + len, PATH_MAX - len, "/", name, NULL);
		ssize_t n = readlink(found, link, sizeof link - 1);
		*missing = n < 0 && errno == ENOENT;
		if (n < 0)
			continue;
		if (++links > LINKS_MAX)
			refuse(ELOOP, "follow", path);
		link[n] = 0;
		left = concatenate(link, "/", left ? left : "");
		len = *link == '/' ? 0 : above;
		found[len] = 0;
	}
	return len ? found : strcpy(found, "/");
}

/* Makes a file, folder or node, and the folders above it that the image lacks; mode with the type. */
static int make(char *path, mode_t mode, dev_t device)
{
	for (char *slash = path; (slash = strchr(slash + 1, '/')); *slash = '/') {
		*slash = 0;
		mkdir(path, 0755);
	}
	return S_ISDIR(mode) ? mkdir(path, mode & 07777) : mknod(path, mode, device);
}

static void write_proc(const char *path, const char *value)
{
	int proc = check(openat(init_root, "proc", O_PATH | O_CLOEXEC), "open", "/proc");

	check(write_at(proc, path, value), "write", path);
	close(proc);
}

/* ---- mounts and nodes ---- */

/*
 * The rootfs becomes "/" of a mount namespace of its own.  Every absolute path after this is looked
 * up inside, so no link in the image leads out; PID 1 stays in the ramdisk, where the kernel looks
 * for the doorbell.  The working directory stays the share, so that bind mounts find their source.
 */
static void enter_rootfs(void)
{
	int share;

	if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
	    (share = open(SHARE, O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0 ||
	    (init_run = open("/run", O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0 ||
	    mount(SHARE "/rootfs", SHARE "/rootfs", NULL, MS_BIND, NULL) < 0 || chdir(SHARE "/rootfs") < 0 ||
	    mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || fchdir(share) < 0)
		die("enter", "the rootfs");
}

static void apply_mount(char **word)
{
	const char *source = word[0], *path = word[1], *type = word[2], *data = word[4];
	unsigned long flags = number(word[3]);
	int missing, keep;
	char *target = resolve(path, &missing);
	struct stat st;

	if (missing) {	/* it becomes a folder, or an empty file if it is a file that is bound there */
		int is_file = flags & MS_BIND && stat(source, &st) == 0 && !S_ISDIR(st.st_mode);
		check(make(target, is_file ? S_IFREG | 0644 : S_IFDIR | 0755, 0), "make", target);
	}
	/* a tmpfs of no mode has that of the folder below it */
	keep = !missing && !strcmp(type, "tmpfs") && !strstr(data, "mode=") && stat(target, &st) == 0;
	if (mount(source, target, type, flags, data) < 0 || (keep && chmod(target, st.st_mode & 07777) < 0))
		die("mount", path);
}

/* A tmpfs that begins with what is below it: busybox's cp copies all that is in its working directory. */
static void apply_copy_up(char **word)
{
	int missing, below, status;
	char *target = resolve(word[1], &missing);
	const char *args[] = { "cp", "-a", ".", target, NULL };
	struct stat st;
	pid_t pid;

	make(target, S_IFDIR | 0755, 0);
	below = check(open(target, O_PATH | O_DIRECTORY | O_CLOEXEC), "open", target);
	apply_mount(word);
	check(stat(target, &st), "stat", target);
	pid = check(fork(), "fork", "cp");
	if (pid == 0) {
		unblock_signals();
		if (fchdir(below) == 0)
			syscall(SYS_execveat, init_root, "bin/busybox", args, NULL, 0);
		_exit(CANNOT_EXECUTE);
	}
	if (waitpid(pid, &status, 0) != pid || status || chown(target, st.st_uid, st.st_gid) < 0 ||
	    chmod(target, st.st_mode & 07777) < 0)	/* the folder itself is not a copy */
		die("copy what is below the tmpfs at", target);
	close(below);
}

static void apply_node(char **word)
{
	int missing;
	char *path = resolve(word[0], &missing);
	mode_t mode = number(word[1]);
	dev_t device = S_ISFIFO(mode) ? 0 : makedev(number(word[2]), number(word[3]));
	struct stat st;

	if (make(path, mode, device) < 0 &&
	    (errno != EEXIST || stat(path, &st) < 0 || (st.st_mode ^ mode) & S_IFMT || st.st_rdev != device))
		die("mknod", path);
	check(chmod(path, mode & 07777), "chmod", path);
	check(chown(path, number(word[4]), number(word[5])), "chown", path);
}

static void apply_link(char **word)
{
	if (symlink(word[0], word[1]) < 0 && errno != EEXIST)
		die("symlink", word[1]);
}

/* A file is covered by /dev/null, a folder by an empty one that stays so. */
static void apply_mask(char **word)
{
	const char *path = word[0];
	struct stat st;
	int result = stat(path, &st);

	if (result < 0 && errno == ENOENT)
		return;
	if (result == 0)
		result = S_ISDIR(st.st_mode) ? mount("tmpfs", path, "tmpfs", MS_RDONLY, NULL) :
					       mount("/dev/null", path, NULL, MS_BIND, NULL);
	check(result, "mask", path);
}

static void apply_readonly(char **word)
{
	const char *path = word[0];
	struct statvfs st;
	int result = mount(path, path, NULL, MS_BIND | MS_REC, NULL);

	if (result < 0 && errno == ENOENT)
		return;
	check(result, "mount", path);
	check(statvfs(path, &st), "statvfs", path);
	/* what the mount forbids already, statvfs(3) says in the flags of mount(2); times of access stay as they are */
	st.f_flag &= MS_NOSUID | MS_NODEV | MS_NOEXEC;
	check(mount(NULL, path, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | st.f_flag, NULL), "remount", path);
}

/* init keeps resolv.conf, for DHCP may change it, and the image keeps its own. */
static void apply_resolv_conf(char **none)
{
	int missing, share = check(open(".", O_PATH | O_DIRECTORY | O_CLOEXEC), "open", "the share");
	char *target;

	(void)none;
	if (faccessat(init_run, "resolv.conf", F_OK, 0) < 0)
		return;	/* nobody has told of a server */
	target = resolve("/etc/resolv.conf", &missing);
	if (missing)
		make(target, S_IFREG | 0644, 0);
	if (fchdir(init_run) < 0 || mount("resolv.conf", target, NULL, MS_BIND, NULL) < 0 || fchdir(share) < 0)
		die("mount", target);
	close(share);
}

/* An archive cannot hold this attribute of a file.  The bytes follow. */
static void apply_file_capability(char **word)
{
	char value[256];
	size_t len = number(word[1]);

	if (len > sizeof value)
		refuse(E2BIG, "set the capabilities of", word[0]);
	for (size_t i = 0; i < len; i++)
		value[i] = number(next());
	check(setxattr(word[0], "security.capability", value, len, 0), "set the capabilities of", word[0]);
}

static void apply_propagation(char **word)
{
	check(mount(NULL, word[0], NULL, number(word[1]), NULL), "set the propagation of", word[0]);
}

/*
 * A pty of the container's own devpts becomes the controlling terminal and the standard streams.
 * The supervisor gets the master, sets the window size, and answers when that is done.
 */
static void apply_terminal(char **none)
{
	union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } control = { 0 };
	char path[64], byte = 0;
	struct iovec iov = { &byte, 1 };
	struct msghdr message = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control,
	};
	int unlocked = 0, index, slave, master = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);

	(void)none;
	if (master < 0 || ioctl(master, TIOCSPTLCK, &unlocked) < 0 || ioctl(master, TIOCGPTN, &index) < 0 ||
	    (slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0)
		die("open", "/dev/pts/ptmx");
	control.header = (struct cmsghdr){
		.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS,
	};
	memcpy(CMSG_DATA(&control.header), &master, sizeof master);
	if (sendmsg(parent, &message, 0) < 0 || read(parent, &byte, 1) != 1 || ioctl(slave, TIOCSCTTY, 0) < 0)
		die("set up", "the terminal");
	for (int fd = 0; fd <= 2; fd++)
		check(dup2(slave, fd), "set up", "the terminal");
	join(path, sizeof path, "/dev/pts/", decimal(index), NULL);
	mknod("/dev/console", S_IFREG | 0620, 0);
	check(mount(path, "/dev/console", NULL, MS_BIND, NULL), "mount", "/dev/console");
}

/* ---- what the process is given ---- */

/* <linux/mount.h>, which does not go with every libc's <sys/mount.h>; some of those have it all. */
#ifndef FSOPEN_CLOEXEC
enum { FSOPEN_CLOEXEC = 1, FSMOUNT_CLOEXEC = 1, FSCONFIG_CMD_CREATE = 6 };
#endif

/*
 * A control group for the container, which is the root of its cgroup namespace: the kernel's own root has no limits.
 * The file system is at no path: a mount that only we have open.  Pairs of file and value follow.
 */
static void apply_cgroup(char **word)
{
	static const char *const controllers[] = { "+cpu", "+cpuset", "+hugetlb", "+io", "+memory", "+pids" };
	int fs = syscall(SYS_fsopen, "cgroup2", FSOPEN_CLOEXEC), root, group;

	if (fs < 0 || syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0 ||
	    (root = syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0)) < 0)
		die("mount", "cgroup2");
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
	int missing;
	char *folder = resolve(word[0], &missing);

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

/* ---- startContainer hooks: in the container, as its user, before its process ---- */

enum { HOOK_LOOK = 10 };	/* milliseconds between looks whether a hook has ended */

static void apply_hook(char **word)
{
	struct hook *hook = &hooks[n_hooks++];

	hook->path = word[0];
	hook->timeout = number(word[1]);
	hook->args = next_strings();
	hook->env = next_strings();
}

static void apply_state(char **word)
{
	hook_state = check(openat(init_run, "state", O_RDWR | O_CREAT | O_CLOEXEC, 0644), "open", "/run/state");
	check(write(hook_state, word[0], strlen(word[0])), "write", "/run/state");
}

/* The beginning of what a hook writes, for the error that it may be; the rest is read and forgotten. */
struct hook_output {
	char text[384];
	size_t len;
};

/* Reads what there is. */
static void keep_output(int pipe, struct hook_output *output)
{
	char buffer[4096];
	ssize_t n = read(pipe, buffer, sizeof buffer);

	for (ssize_t i = 0; i < n && output->len < sizeof output->text - 1; i++)
		output->text[output->len++] = buffer[i];
}

/* Waits for the hook until it has ended, and returns its status, or until its time is over: -1, it is killed then. */
static int wait_for_hook(pid_t pid, unsigned long timeout, int pipes[2][2], struct hook_output *outputs)
{
	int64_t end = milliseconds() + (int64_t)timeout * 1000;
	struct pollfd fds[] = { { pipes[0][0], POLLIN, 0 }, { pipes[1][0], POLLIN, 0 } };
	int status, last, ended = 0, late = 0;

	do {	/* once more when it has ended, for all that it has written is there then */
		last = ended;
		if (timeout && !ended && milliseconds() >= end) {
			kill(-pid, SIGKILL);
			late = 1;
		}
		poll(fds, 2, ended ? 0 : HOOK_LOOK);
		ended = ended || waitpid(pid, &status, WNOHANG) == pid;
		for (int i = 0; i < 2; i++)
			if (fds[i].revents)
				keep_output(fds[i].fd, &outputs[i]);
	} while (!last);
	for (int i = 0; i < 2; i++)
		while (outputs[i].len && (unsigned char)outputs[i].text[outputs[i].len - 1] <= ' ')
			outputs[i].text[--outputs[i].len] = 0;
	return late ? -1 : status;
}

/* In a process group of its own, whichever of both processes makes that. */
static pid_t start_hook(const struct hook *hook, int pipes[2][2], const sigset_t *before)
{
	pid_t pid = check(fork(), "fork", "a hook");

	setpgid(pid, pid);
	if (pid)
		return pid;
	sigprocmask(SIG_SETMASK, before, NULL);
	close(parent);	/* what goes wrong from here is the hook's output */
	if (lseek(hook_state, 0, SEEK_SET) < 0 || dup2(hook_state, 0) < 0 || dup2(pipes[0][1], 1) < 0 ||
	    dup2(pipes[1][1], 2) < 0)
		die("make", "the streams of a hook");
	if (*hook->env)
		environ = hook->env;
	execv(hook->path, hook->args);
	die_as(NOT_FOUND, "exec", hook->path);
}

/* status: of wait_for_hook(). */
static void fail_hook(const struct hook *hook, size_t index, int status, const struct hook_output *outputs)
{
	const char *reason = "hook ran past specified timeout of ", *unit = "s";
	unsigned long value = hook->timeout;
	char message[MESSAGE_MAX];
	size_t len;

	if (status >= 0) {
		reason = WIFSIGNALED(status) ? "signal " : "exit status ", unit = "";
		value = WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status);
	}
	len = join(message, sizeof message - 1, "error running startContainer hook #", decimal(index), ": ", reason,
		   decimal(value), unit, ", stdout: ", outputs[0].text, ", stderr: ", outputs[1].text, NULL);
	for (size_t i = 0; i < len; i++)	/* it may go to a terminal */
		if ((unsigned char)message[i] < ' ' || message[i] == 127)
			message[i] = ' ';
	die_with(1, strcat(message, "\n"));
}

static void run_hook(const struct hook *hook, size_t index, const sigset_t *before)
{
	struct hook_output outputs[2] = { 0 };
	int pipes[2][2], status;
	pid_t pid;

	if (pipe2(pipes[0], O_CLOEXEC) < 0 || pipe2(pipes[1], O_CLOEXEC) < 0)
		die("make", "a pipe for a hook");
	pid = start_hook(hook, pipes, before);
	status = wait_for_hook(pid, hook->timeout, pipes, outputs);
	for (int i = 0; i < 4; i++)
		close(pipes[i / 2][i % 2]);
	if (status)
		fail_hook(hook, index, status, outputs);
}

/* ---- keywords ---- */

enum { OPERANDS_MAX = 7 };

static const struct {
	const char *keyword;
	size_t operands;
	void (*apply)(char **word);
} keywords[] = {
	{ "cgroup", 1, apply_cgroup },			/* n (file value)... */
	{ "mount", 5, apply_mount },			/* source target type flags data */
	{ "copy_up", 5, apply_copy_up },		/* as mount */
	{ "node", 6, apply_node },			/* path mode major minor uid gid */
	{ "link", 2, apply_link },			/* content path */
	{ "terminal", 0, apply_terminal },
	{ "mask", 1, apply_mask },			/* path */
	{ "readonly", 1, apply_readonly },		/* path */
	{ "file_capability", 2, apply_file_capability },	/* path below the share, n bytes... */
	{ "resolv_conf", 0, apply_resolv_conf },
	{ "propagation", 2, apply_propagation },	/* path flags */
	{ "sysctl", 2, apply_sysctl },			/* path below /proc, value */
	{ "hostname", 1, apply_hostname },		/* name */
	{ "domainname", 1, apply_domainname },		/* name */
	{ "rlimit", 3, apply_rlimit },			/* resource soft hard */
	{ "oom", 1, apply_oom },			/* adjustment */
	{ "ioprio", 1, apply_ioprio },			/* class << 13 | priority */
	{ "scheduler", 7, apply_scheduler },		/* policy flags nice priority runtime deadline period */
	{ "user", 3, apply_user },			/* uid gid umask */
	{ "group", 1, apply_group },			/* gid */
	{ "capabilities", 5, apply_capabilities },	/* bounding effective inheritable permitted ambient */
	{ "no_new_privileges", 0, apply_no_new_privileges },
	{ "personality", 1, apply_personality },	/* persona of personality(2) */
	{ "seccomp", 2, apply_seccomp },		/* flags n (code jt jf k)... */
	{ "cwd", 1, apply_cwd },			/* path */
	{ "arg", 1, apply_arg },			/* string */
	{ "env", 1, apply_env },			/* NAME=value */
	{ "hook", 2, apply_hook },			/* path timeout n args... n env... */
	{ "state", 1, apply_state },			/* json, for hooks */
};

static void apply_config(void)
{
	char *word[OPERANDS_MAX];

	while (next_word < words_end) {
		char *keyword = next();
		size_t i = 0;

		while (i < COUNT(keywords) && strcmp(keyword, keywords[i].keyword))
			i++;
		if (i == COUNT(keywords))
			refuse(EPROTO, "apply", keyword);
		for (size_t n = 0; n < keywords[i].operands; n++)
			word[n] = next();
		keywords[i].apply(word);
	}
}

/* ---- from init's child to the container's process ---- */

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
		char *fields[7];
		int n = 0;

		while (n < 7 && (fields[n] = strsep(&line, ":")))
			n++;
		if (n == 7 && !line && !strcmp(fields[2], uid))
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

/* The order is capabilities(7)'s: the bounding set while we may, the rest once the user is what it will be. */
static void become_user(void)
{
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
	check(chdir(settings.cwd), "chdir", settings.cwd);
	check(prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0), "keep", "the capabilities");
	set_capabilities();
	if (!settings.no_new_privileges)
		return;
	check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "set", "no new privileges");
	install_filter();
}

/* before: the signal mask that the process starts with. */
void run_process(const sigset_t *before)
{
	init_root = check(open("/", O_PATH | O_DIRECTORY | O_CLOEXEC), "open", "/");
	write_proc("self/oom_score_adj", "0");	/* init and this program are spared when memory runs out */
	enter_rootfs();
	apply_config();
	set_home();
	become_user();
	environ = settings.env;
	for (size_t i = 0; i < n_hooks; i++)
		run_hook(&hooks[i], i, before);
	sigprocmask(SIG_SETMASK, before, NULL);
	/* glibc's execvp(3) has /bin/sh run a file that is no program, and runc has not */
	(strchr(settings.args[0], '/') ? execv : execvp)(settings.args[0], settings.args);
	die_as(errno == ENOENT ? NOT_FOUND : CANNOT_EXECUTE, "exec", settings.args[0]);
}

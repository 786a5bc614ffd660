/* SPDX-License-Identifier: Apache-2.0 */
/* The container's files: its rootfs as "/", and the mounts, nodes and links in it. */
#include "container.h"
#include <limits.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <termios.h>

int init_run;

/* ---- paths ---- */

enum { LINKS_MAX = 40 };	/* of one path, as the kernel has it */

/*
 * Where a path leads, by names that are no links: mkdir(2) and mount(2) do not go where a link leads to nothing.  Names
 * that are missing count as folders.  "/" is the container's, so no link leads out.  *missing: whether it is not there.
 */
char *resolve(const char *path, int *missing)
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

static int make_one(const char *path, mode_t mode, dev_t device)
{
	return S_ISDIR(mode) ? mkdir(path, mode & 07777) : mknod(path, mode, device);
}

/*
 * Makes a file, folder or node, and the folders above it that the image lacks; mode with the type.  First as if they
 * were there: to make one that is asks the host.
 */
int make(char *path, mode_t mode, dev_t device)
{
	int result = make_one(path, mode, device);

	if (result == 0 || errno != ENOENT)
		return result;
	for (char *slash = path; (slash = strchr(slash + 1, '/')); *slash = '/') {
		*slash = 0;
		mkdir(path, 0755);
	}
	return make_one(path, mode, device);
}

/* ---- mounts and nodes ---- */

/*
 * The rootfs becomes "/" of a mount namespace of its own.  Every absolute path after this is looked
 * up inside, so no link in the image leads out; PID 1 stays in the ramdisk, where the kernel looks
 * for the doorbell.  The working directory stays the share, so that bind mounts find their source.
 */
void enter_rootfs(void)
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

	if (!(flags & MS_REMOUNT) && !strcmp(target, "/"))	/* only a process of exec would see what is there */
		refuse(EINVAL, "mount over the rootfs at", path);
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

	if (missing) {
		apply_mount(word);
		return;
	}
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

	if (make(path, mode, device) == 0) {
		check(chmod(path, mode & 07777), "chmod", path);
		check(chown(path, number(word[4]), number(word[5])), "chown", path);
	} else if (errno != EEXIST || stat(path, &st) < 0 || (st.st_mode ^ mode) & S_IFMT || st.st_rdev != device) {
		die("mknod", path);	/* one that is there already stays as it is: it may be the host's */
	}
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
	if (process_number)
		return;
	join(path, sizeof path, "/dev/pts/", decimal(index), NULL);
	mknod("/dev/console", S_IFREG | 0620, 0);
	check(mount(path, "/dev/console", NULL, MS_BIND, NULL), "mount", "/dev/console");
}

/* One that leads to a pipe or a file: no carriage returns are added to its lines. */
static void apply_plain_terminal(char **none)
{
	struct termios mode;

	apply_terminal(none);
	check(tcgetattr(1, &mode), "set up", "the terminal");
	mode.c_oflag &= ~ONLCR;
	check(tcsetattr(1, TCSANOW, &mode), "set up", "the terminal");
}

const struct keyword file_keywords[] = {
	{ "mount", 5, apply_mount, LATE },			/* source target type flags data */
	{ "copy_up", 5, apply_copy_up, LATE },			/* as mount */
	{ "node", 6, apply_node, LATE },			/* path mode major minor uid gid */
	{ "link", 2, apply_link, LATE },			/* content path */
	{ "terminal", 0, apply_terminal, LATE },
	{ "plain_terminal", 0, apply_plain_terminal, LATE },
	{ "mask", 1, apply_mask, LATE },			/* path */
	{ "readonly", 1, apply_readonly, LATE },		/* path */
	{ "file_capability", 2, apply_file_capability, LATE },	/* path below the share, n bytes... */
	{ "resolv_conf", 0, apply_resolv_conf, LATE },
	{ "propagation", 2, apply_propagation, LATE },		/* path flags */
	{ NULL, 0, NULL, LATE }
};

/*
 * init:  PID 1 of the VM.  A child of it, enter, starts the container's process and carries its standard streams.
 * xs:    the same program under a second name, one xenstore request from the shell.
 * net:   under a third one, sets up the VM's network interfaces as xenstore says.
 *
 * They do what busybox cannot: exact argv and environment, mounts that cannot leave the rootfs, credentials,
 * binary-safe streams; and, as a process costs a VM's start more than all else here, what every container needs.
 * What few need, the script /sbin/setup does.  All policy is in runx.py, which writes
 * /container/config: NUL-terminated strings, flags of clone(2) for the process's own namespaces, and then
 * each keyword followed by its operands (see keywords[]).
 * Nothing here decides anything about the host: the other end of the consoles checks what it reads.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/netlink.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

/* <linux/mount.h>, which does not go with <sys/mount.h> */
enum { FSOPEN_CLOEXEC = 1, FSMOUNT_CLOEXEC = 1, FSCONFIG_CMD_CREATE = 6 };

#define CONFIG "/container/config"
#define SHARE "/mnt"	/* what dom0 exports: rootfs, and mounts/N for the bind mounts */

/* The container's own exit status when its process cannot be started: that of a shell. */
enum { CANNOT_EXECUTE = 126, NOT_FOUND = 127 };
enum { MESSAGE_MAX = 1024 };	/* bytes; a node of xenstore holds 2048 */
enum { INTERFACES_MAX = 64 };	/* that ask by DHCP */
enum { HOOK_LOOK = 10 };	/* milliseconds between looks whether a hook has ended */
enum { RELEASE_TIME = 1000 };	/* milliseconds that a DHCP client has to give its lease back */

/* Joins the strings up to NULL in buffer, as far as it reaches; returns their length.  No stdio: it is half of libc. */
static size_t join(char *buffer, size_t size, ...)
{
	size_t len = 0;
	va_list strings;

	va_start(strings, size);
	for (const char *string; (string = va_arg(strings, const char *));)
		while (*string && len < size - 1)
			buffer[len++] = *string++;
	va_end(strings);
	buffer[len] = 0;
	return len;
}

static char *decimal(unsigned long number)
{
	static char digits[4][24];
	static int turn;
	char *end = digits[turn = (turn + 1) % 4] + 23;

	do
		*--end = '0' + number % 10;
	while (number /= 10);
	return end;
}

/*
 * A socket to the parent, in the child that becomes the container's process.  It carries what went
 * wrong, or a terminal; that it ends with neither says that the process has been executed.
 */
static int parent = -1;

static void tell_error(const char *message);

static void die_with(int status, const char *message, size_t len)
{
	write(2, message, len);
	if (parent >= 0)
		write(parent, message, len);
	else
		tell_error(message);
	_exit(status);
}

static void die(int status, const char *operation, const char *object)
{
	char message[MESSAGE_MAX];
	size_t len = join(message, sizeof message, operation, " ", object, ": ", strerror(errno), "\n", NULL);

	die_with(status, message, len);
}

/* ---- xenstore: the kernel's /dev/xen/xenbus, wire format of xen/include/public/io/xs_wire.h ---- */

enum { XS_DIRECTORY = 1, XS_READ = 2, XS_WRITE = 11, XS_RM = 13, XS_ERROR = 16 };
enum { XS_PAYLOAD_MAX = 4096 };

struct xs_header { uint32_t type, req_id, tx_id, len; };

/* One request; the reply's payload goes to reply (NUL added).  Returns its length, or -1. */
static int xs_request(uint32_t type, const char *path, const char *value, char *reply)
{
	char message[sizeof(struct xs_header) + XS_PAYLOAD_MAX + 1];
	struct xs_header *header = (void *)message;
	size_t path_len = strlen(path) + 1, value_len = value ? strlen(value) : 0, have = 0;
	int fd;

	if (path_len + value_len > XS_PAYLOAD_MAX)
		return -1;
	fd = open("/dev/xen/xenbus", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return -1;
	*header = (struct xs_header){ type, 0, 0, path_len + value_len };
	memcpy(message + sizeof *header, path, path_len);
	if (value)
		memcpy(message + sizeof *header + path_len, value, value_len);
	if (write(fd, message, sizeof *header + header->len) < 0)
		goto failed;
	do {
		ssize_t n = read(fd, message + have, sizeof message - 1 - have);
		if (n <= 0)
			goto failed;
		have += n;
	} while (have < sizeof *header || have < sizeof *header + header->len);
	close(fd);
	if (header->type == XS_ERROR)
		return -1;
	memcpy(reply, message + sizeof *header, header->len);
	reply[header->len] = 0;
	return header->len;
failed:
	close(fd);
	return -1;
}

/* For the user, why the container cannot be started. */
static void tell_error(const char *message)
{
	char reply[XS_PAYLOAD_MAX + 1];

	xs_request(XS_WRITE, "data/error", message, reply);
}

/* xs read PATH | write PATH VALUE | rm PATH | ls PATH.  Exit status 1 where xenstore refuses, 2 for another usage. */
static int xs_main(int argc, char **argv)
{
	char reply[XS_PAYLOAD_MAX + 1];
	const char *verb = argc > 2 ? argv[1] : "";
	uint32_t type = !strcmp(verb, "read") ? XS_READ : !strcmp(verb, "ls") ? XS_DIRECTORY :
			!strcmp(verb, "rm") ? XS_RM : !strcmp(verb, "write") ? XS_WRITE : 0;
	int len;

	if (!type || argc != (type == XS_WRITE ? 4 : 3))
		return 2;
	len = xs_request(type, argv[2], type == XS_WRITE ? argv[3] : NULL, reply);
	if (len < 0)
		return 1;
	for (int i = 0; type == XS_DIRECTORY && i < len; i++)
		reply[i] = reply[i] ? reply[i] : '\n';
	if (type == XS_READ)
		reply[len++] = '\n';
	if (type == XS_READ || type == XS_DIRECTORY)
		write(1, reply, len);
	return 0;
}

/* ---- net: interfaces, addresses and routes, as messages of rtnetlink(7) that runx.py has made ---- */

static int is_there(const char *path)
{
	return access(path, F_OK) == 0;
}

static int write_at(int folder, const char *path, const char *value)
{
	int fd = openat(folder, path, O_WRONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : write(fd, value, strlen(value));

	if (fd >= 0)
		close(fd);
	return n < 0 ? -1 : 0;
}

static int digit(char c)
{
	return c >= 'a' ? c - 'a' + 10 : c - '0';
}

/* The number of the interface with a MAC address, which is 12 hexadecimal digits. */
static uint32_t find_interface(const char *mac)
{
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq request;

	for (int index = 1; index < 1024; index++) {
		int i = 0;
		request.ifr_ifindex = index;
		if (ioctl(fd, SIOCGIFNAME, &request) < 0 || ioctl(fd, SIOCGIFHWADDR, &request) < 0)
			continue;
		while (i < 6 && (unsigned char)request.ifr_hwaddr.sa_data[i] == (digit(mac[2 * i]) << 4 | digit(mac[2 * i + 1])))
			i++;
		if (i == 6) {
			close(fd);
			return index;
		}
	}
	errno = ENODEV;
	die(1, "find the network interface", mac);
	return 0;
}

/* Sends one message, in hexadecimal with "@" for the interface's number, and dies with the kernel's answer if that is no. */
static void send_message(int netlink, const char *hex, uint32_t index)
{
	char message[XS_PAYLOAD_MAX / 2 + sizeof index];
	struct { struct nlmsghdr header; struct nlmsgerr error; char more[sizeof message]; } answer;
	size_t len = 0;

	for (const char *c = hex; *c && len + sizeof index <= sizeof message;) {
		if (*c == '@') {
			memcpy(message + len, &index, sizeof index);
			len += sizeof index;
			c++;
		} else {
			message[len++] = digit(c[0]) << 4 | digit(c[1]);
			c += 2;
		}
	}
	if (send(netlink, message, len, 0) < 0 || recv(netlink, &answer, sizeof answer, 0) < 0)
		die(1, "send rtnetlink message", hex);
	errno = -answer.error.error;
	if (errno)
		die(1, "apply rtnetlink message", hex);
}

/*
 * data/network/0, 1, ... in this order: a MAC address, then words that are messages, or files below /proc with what is
 * to be written to them: "sys/net/..=1".
 */
static int net_main(void)
{
	int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE), proc = open("/proc", O_PATH | O_CLOEXEC);
	char path[64], text[XS_PAYLOAD_MAX + 1], *value;

	for (unsigned long number = 0;; number++) {
		join(path, sizeof path, "data/network/", decimal(number), NULL);
		if (xs_request(XS_READ, path, NULL, text) < 0)
			return 0;
		uint32_t index = find_interface(strtok(text, " "));
		for (char *word; (word = strtok(NULL, " "));) {
			if (!(value = strchr(word, '='))) {
				send_message(netlink, word, index);
			} else {
				*value++ = 0;
				write_at(proc, word, value);	/* what this kernel has not, it need not be told */
			}
		}
	}
}

/* A container without any network has its own loopback too, as under runc. */
static void start_loopback(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq request = { .ifr_name = "lo", .ifr_flags = IFF_UP };

	ioctl(fd, SIOCSIFFLAGS, &request);
	close(fd);
}

/* Leases of DHCP are given back: udhcpc does that on SIGTERM, and leaves.  Its pid for eth<N> is in /run/dhcp.<N>. */
static void release_leases(void)
{
	char path[32], pid[24];

	if (!is_there("/run/dns"))
		return;	/* init has not set up any interface */
	for (unsigned long number = 0; number < INTERFACES_MAX; number++) {
		join(path, sizeof path, "/run/dhcp.", decimal(number), NULL);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t n = fd < 0 ? -1 : read(fd, pid, sizeof pid - 1);
		if (fd >= 0)
			close(fd);
		if (n <= 0)
			continue;
		pid[n] = 0;
		struct pollfd end = { syscall(SYS_pidfd_open, strtoul(pid, NULL, 10), 0), POLLIN, 0 };
		if (end.fd < 0)
			continue;
		syscall(SYS_pidfd_send_signal, end.fd, SIGTERM, NULL, 0);
		poll(&end, 1, RELEASE_TIME);
		close(end.fd);
	}
}

/* ---- the container's process ---- */

static int init_root;	/* init's own "/", with busybox and a /proc that the container may not have */
static int init_run;	/* its /run, in the container's mount namespace */
static char *config_next, *config_end;

static char *next(void)
{
	char *string = config_next;

	if (string >= config_end) {
		errno = EPROTO;
		die(CANNOT_EXECUTE, "read", CONFIG);
	}
	config_next += strlen(string) + 1;
	return string;
}

static unsigned long next_number(void)
{
	return strtoul(next(), NULL, 10);
}

static uint64_t next_u64(void)
{
	return strtoull(next(), NULL, 10);
}

/* The content of a file, with a NUL behind it; *size if that is wanted. */
static char *load(int folder, const char *path, size_t *size)
{
	struct stat st;
	int fd = openat(folder, path, O_RDONLY | O_CLOEXEC);
	char *content = NULL;

	if (fd < 0 || fstat(fd, &st) < 0 || !(content = malloc(st.st_size + 1)) ||
	    read(fd, content, st.st_size) != st.st_size)
		die(CANNOT_EXECUTE, "read", path);
	close(fd);
	content[st.st_size] = 0;
	if (size)
		*size = st.st_size;
	return content;
}

static void load_config(void)
{
	size_t size;

	config_next = load(AT_FDCWD, CONFIG, &size);
	config_end = config_next + size;
}

enum { LINKS_MAX = 40 };	/* of one path, as the kernel has it */

static void *allocate(size_t size)
{
	void *memory = calloc(1, size);

	if (!memory)
		die(CANNOT_EXECUTE, "allocate", "memory");
	return memory;
}

static void refuse_path(int reason, const char *path)
{
	errno = reason;
	die(CANNOT_EXECUTE, "follow", path);
}

/*
 * Where a path leads, by names that are no links: mkdir(2) and mount(2) do not go where a link leads to nothing.  Names
 * that are missing count as folders.  "/" is the container's, so no link leads out.  *missing: whether it is not there.
 */
static char *resolve(const char *path, int *missing)
{
	char *found = allocate(PATH_MAX), *left = strdup(path), link[PATH_MAX], *name;
	size_t len = 0, links = 0;

	if (!left)
		refuse_path(ENOMEM, path);
	*missing = 0;
	while (left && (name = strsep(&left, "/"))) {
		size_t before = len;
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
			refuse_path(ENAMETOOLONG, path);
		len += join(found + len, PATH_MAX - len, "/", name, NULL);
		ssize_t n = readlink(found, link, sizeof link - 1);
		*missing = n < 0 && errno == ENOENT;
		if (n < 0)
			continue;
		if (++links > LINKS_MAX)
			refuse_path(ELOOP, path);
		link[n] = 0;
		size_t size = n + (left ? strlen(left) : 0) + 2;
		char *rest = allocate(size);
		join(rest, size, link, "/", left ? left : "", NULL);
		left = rest;
		len = *link == '/' ? 0 : before;
		found[len] = 0;
	}
	return len ? found : strcpy(found, "/");
}

/* mkdir -p, for the folders that mounts and cwd name and the image lacks. */
static int make_folders(char *path)
{
	for (char *slash = path; (slash = strchr(slash + 1, '/')); *slash = '/') {
		*slash = 0;
		mkdir(path, 0755);
	}
	return mkdir(path, 0755);
}

static void make_parent(char *path)
{
	char *slash = strrchr(path, '/');

	*slash = 0;
	if (*path)
		make_folders(path);
	*slash = '/';
}

static int make_file(char *path)
{
	make_parent(path);
	return mknod(path, S_IFREG | 0644, 0);
}

/* Where a mount goes: a folder, or an empty file if it is a file that is bound there. */
static void make_target(char *path, const char *source, unsigned long flags)
{
	struct stat st;

	if ((!(flags & MS_BIND) || stat(source, &st) < 0 || S_ISDIR(st.st_mode) ? make_folders : make_file)(path) < 0)
		die(CANNOT_EXECUTE, "make", path);
}

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
		die(CANNOT_EXECUTE, "enter", "the rootfs");
}

/*
 * A pty of the container's own devpts becomes the controlling terminal and the standard streams.
 * The parent gets the master, sets the window size, and answers when that is done.
 */
static void open_terminal(void)
{
	union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } control = { 0 };
	struct iovec iov = { "", 1 };
	struct msghdr message = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control,
	};
	int unlocked = 0, number, slave, master = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
	char path[64], answer;

	if (master < 0 || ioctl(master, TIOCSPTLCK, &unlocked) < 0 || ioctl(master, TIOCGPTN, &number) < 0 ||
	    (slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0)
		die(CANNOT_EXECUTE, "open", "/dev/pts/ptmx");
	control.header = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS };
	memcpy(CMSG_DATA(&control.header), &master, sizeof master);
	if (sendmsg(parent, &message, 0) < 0 || read(parent, &answer, 1) != 1 || ioctl(slave, TIOCSCTTY, 0) < 0)
		die(CANNOT_EXECUTE, "set up", "the terminal");
	for (int fd = 0; fd <= 2; fd++)
		dup2(slave, fd);
	join(path, sizeof path, "/dev/pts/", decimal(number), NULL);
	mknod("/dev/console", S_IFREG | 0620, 0);
	if (mount(path, "/dev/console", NULL, MS_BIND, NULL) < 0)
		die(CANNOT_EXECUTE, "mount", "/dev/console");
}

/* ---- startContainer hooks: in the container, as its user, before its process ---- */

struct hook {
	unsigned long timeout;	/* seconds, 0: none */
	char *path, **args, **env;	/* no env: the process's */
};

static struct hook *hooks;
static size_t n_hooks;
static char *hook_state;	/* what they get on standard input */

static char **next_strings(void)
{
	size_t count = next_number();
	char **strings = calloc(count + 1, sizeof *strings);

	for (size_t i = 0; i < count; i++)
		strings[i] = next();
	return strings;
}

static void add_hook(void)
{
	struct hook *hook;

	hooks = realloc(hooks, (n_hooks + 1) * sizeof *hooks);
	hook = &hooks[n_hooks++];
	hook->path = next();
	hook->timeout = next_number();
	hook->args = next_strings();
	hook->env = next_strings();
}

static int64_t milliseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64_C(1000) + now.tv_nsec / 1000000;
}

/* The beginning of what a hook writes, for the error that it may be; the rest is read and forgotten. */
struct hook_output {
	char text[384];
	size_t len;
};

/* Reads what there is; returns the pipe, or -1 at its end. */
static int keep_output(int pipe, struct hook_output *output)
{
	char buffer[4096];
	ssize_t n = read(pipe, buffer, sizeof buffer);

	for (ssize_t i = 0; i < n && output->len < sizeof output->text - 1; i++)
		output->text[output->len++] = buffer[i];
	return n == 0 ? -1 : pipe;
}

/* Waits for the hook until it has ended, and returns its status, or until its time is over: -1, it is killed then. */
static int wait_for_hook(pid_t pid, unsigned long timeout, const int *pipes, struct hook_output *outputs)
{
	int64_t end = milliseconds() + (int64_t)timeout * 1000;
	struct pollfd fds[] = { { pipes[0], POLLIN, 0 }, { pipes[1], POLLIN, 0 } };
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
				fds[i].fd = keep_output(fds[i].fd, &outputs[i]);
	} while (!last);
	for (int i = 0; i < 2; i++)
		while (outputs[i].len && (unsigned char)outputs[i].text[outputs[i].len - 1] <= ' ')
			outputs[i].text[--outputs[i].len] = 0;
	return late ? -1 : status;
}

static void run_hook(const struct hook *hook, size_t number, const sigset_t *before)
{
	char message[MESSAGE_MAX];
	struct hook_output outputs[2] = { 0 };
	int stdin_pipe[2], pipes[2][2], status;
	const char *reason, *value;
	pid_t pid, writer;

	if (pipe2(stdin_pipe, O_CLOEXEC) < 0 || pipe2(pipes[0], O_CLOEXEC) < 0 || pipe2(pipes[1], O_CLOEXEC) < 0)
		die(CANNOT_EXECUTE, "make", "a pipe for a hook");
	writer = fork();
	if (writer == 0) {	/* a hook need not read, and the state may be longer than a pipe */
		close(stdin_pipe[0]);
		write(stdin_pipe[1], hook_state, strlen(hook_state));
		_exit(0);
	}
	pid = fork();
	if (writer < 0 || pid < 0)
		die(CANNOT_EXECUTE, "fork", "a hook");
	if (pid == 0) {
		setpgid(0, 0);
		sigprocmask(SIG_SETMASK, before, NULL);
		dup2(stdin_pipe[0], 0);
		dup2(pipes[0][1], 1);
		dup2(pipes[1][1], 2);
		if (*hook->env)
			environ = hook->env;
		execv(hook->path, hook->args);
		parent = -1;
		die(NOT_FOUND, "exec", hook->path);
	}
	setpgid(pid, pid);
	close(stdin_pipe[0]);
	close(stdin_pipe[1]);
	close(pipes[0][1]);
	close(pipes[1][1]);
	int ends[] = { pipes[0][0], pipes[1][0] };
	status = wait_for_hook(pid, hook->timeout, ends, outputs);
	close(ends[0]);
	close(ends[1]);
	kill(writer, SIGKILL);
	waitpid(writer, NULL, 0);
	if (status == 0)
		return;
	reason = status < 0 ? "hook ran past specified timeout of " : WIFSIGNALED(status) ? "signal " : "exit status ";
	value = decimal(status < 0 ? hook->timeout : WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
	size_t len = join(message, sizeof message, "error running startContainer hook #", decimal(number), ": ", reason,
			  value, status < 0 ? "s" : "", ", stdout: ", outputs[0].text, ", stderr: ", outputs[1].text, NULL);
	for (size_t i = 0; i < len; i++)	/* it may go to a terminal */
		if ((unsigned char)message[i] < ' ' || message[i] == 127)
			message[i] = ' ';
	message[len < sizeof message - 1 ? len++ : len - 1] = '\n';
	die_with(1, message, len);
}

/* ---- the records of the config: a function each, whose operands are named in keywords[] ---- */

static struct {
	char **args, **env, *cwd;
	size_t n_args, n_env, n_groups;
	gid_t *groups, gid;
	uid_t uid;
	mode_t umask;
	uint64_t bounding, effective, inheritable, permitted, ambient;	/* capabilities, a bit each */
	int no_new_privileges;
	struct sock_fprog filter;	/* seccomp(2); len 0: none */
	unsigned long filter_flags;
} settings = { .cwd = "/", .umask = 022 };

static void append(char ***list, size_t *count, char *string)
{
	*list = realloc(*list, (*count + 2) * sizeof **list);
	(*list)[(*count)++] = string;
	(*list)[*count] = NULL;
}

static void write_proc(const char *path, const char *value)
{
	int proc = openat(init_root, "proc", O_PATH | O_CLOEXEC);

	if (write_at(proc, path, value) < 0)
		die(CANNOT_EXECUTE, "write", path);
	close(proc);
}

static void apply_mount(void)
{
	char *source = next(), *path = next(), *type = next();
	unsigned long flags = next_number();
	char *data = next(), *target;
	int missing;
	struct stat st;

	target = resolve(path, &missing);
	if (missing)
		make_target(target, source, flags);
	/* a tmpfs of no mode has that of the folder below it */
	int keep = !missing && !strcmp(type, "tmpfs") && !strstr(data, "mode=") && stat(target, &st) == 0;
	if (mount(source, target, type, flags, data) < 0 || (keep && chmod(target, st.st_mode & 07777) < 0))
		die(CANNOT_EXECUTE, "mount", path);
}

/* A tmpfs that begins with what is below it: busybox's cp has all of that in its working directory copied. */
static void apply_copy_up(void)
{
	int missing, below, status = 0;
	struct stat st;
	char *target = resolve(config_next + strlen(config_next) + 1, &missing);	/* the second operand of mount */
	pid_t pid;

	make_folders(target);
	below = open(target, O_PATH | O_DIRECTORY | O_CLOEXEC);
	apply_mount();
	stat(target, &st);
	pid = below < 0 ? -1 : fork();
	if (pid == 0) {
		char *args[] = { "cp", "-a", ".", target, NULL };
		sigset_t none;
		sigemptyset(&none);
		sigprocmask(SIG_SETMASK, &none, NULL);
		if (fchdir(below) == 0)
			syscall(SYS_execveat, init_root, "bin/busybox", args, NULL, 0);
		_exit(CANNOT_EXECUTE);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid || status || chown(target, st.st_uid, st.st_gid) < 0 ||
	    chmod(target, st.st_mode & 07777) < 0)	/* the folder itself is not a copy */
		die(CANNOT_EXECUTE, "copy what is below the tmpfs at", target);
	close(below);
}

static void apply_node(void)
{
	int missing;
	char *path = resolve(next(), &missing);
	mode_t mode = next_number();
	unsigned long major = next_number(), minor = next_number();
	uid_t uid = next_number();
	gid_t gid = next_number();
	struct stat st;
	dev_t device = S_ISFIFO(mode) ? 0 : makedev(major, minor);

	make_parent(path);
	if (mknod(path, mode, device) < 0 &&
	    (errno != EEXIST || stat(path, &st) < 0 || (st.st_mode & S_IFMT) != (mode & S_IFMT) || st.st_rdev != device))
		die(CANNOT_EXECUTE, "mknod", path);
	if (chmod(path, mode & 07777) < 0 || chown(path, uid, gid) < 0)
		die(CANNOT_EXECUTE, "chown", path);
}

static void apply_link(void)
{
	char *content = next(), *path = next();

	if (symlink(content, path) < 0 && errno != EEXIST)
		die(CANNOT_EXECUTE, "symlink", path);
}

/* A file is covered by /dev/null, a folder by an empty one that stays so. */
static void apply_mask(void)
{
	char *path = next();
	struct stat st;

	if (stat(path, &st) < 0 && errno == ENOENT)
		return;
	if (S_ISDIR(st.st_mode) ? mount("tmpfs", path, "tmpfs", MS_RDONLY, NULL) : mount("/dev/null", path, NULL, MS_BIND, NULL))
		die(CANNOT_EXECUTE, "mask", path);
}

static void apply_readonly(void)
{
	char *path = next();
	struct statvfs st;
	unsigned long kept;

	if (mount(path, path, NULL, MS_BIND | MS_REC, NULL) < 0) {
		if (errno == ENOENT)
			return;
		die(CANNOT_EXECUTE, "mount", path);
	}
	/* what the mount forbids already, statvfs(3) says in the flags of mount(2) */
	kept = statvfs(path, &st) < 0 ? 0 : st.f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME | MS_RELATIME);
	if (mount(NULL, path, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | kept, NULL) < 0)
		die(CANNOT_EXECUTE, "remount", path);
}

/* init keeps resolv.conf, for DHCP may change it, and the image keeps its own. */
static void apply_resolv_conf(void)
{
	int missing, share = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
	char *target;

	if (faccessat(init_run, "resolv.conf", F_OK, 0) < 0)
		return;	/* nobody has told of a server */
	target = resolve("/etc/resolv.conf", &missing);
	if (missing)
		make_file(target);
	if (fchdir(init_run) < 0 || mount("resolv.conf", target, NULL, MS_BIND, NULL) < 0 || fchdir(share) < 0)
		die(CANNOT_EXECUTE, "mount", target);
	close(share);
}

/* An archive cannot hold this attribute of a file: path below the share, number of bytes, bytes. */
static void apply_file_capability(void)
{
	char *path = next(), value[256];
	size_t len = next_number();

	if (len > sizeof value) {
		errno = E2BIG;
		die(CANNOT_EXECUTE, "set the capabilities of", path);
	}
	for (size_t i = 0; i < len; i++)
		value[i] = next_number();
	if (setxattr(path, "security.capability", value, len, 0) < 0)
		die(CANNOT_EXECUTE, "set the capabilities of", path);
}

static void apply_propagation(void)
{
	char *path = next();

	if (mount(NULL, path, NULL, next_number(), NULL) < 0)
		die(CANNOT_EXECUTE, "set the propagation of", path);
}

/*
 * A control group for the container, which is the root of its cgroup namespace: the kernel's own root has no limits.
 * The file system is at no path: a mount that only we have open.
 */
static void apply_cgroup(void)
{
	static const char *const controllers[] = { "+cpu", "+cpuset", "+hugetlb", "+io", "+memory", "+pids" };
	int fs = syscall(SYS_fsopen, "cgroup2", FSOPEN_CLOEXEC), root, group;

	if (fs < 0 || syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0 ||
	    (root = syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0)) < 0)
		die(CANNOT_EXECUTE, "mount", "cgroup2");
	for (size_t i = 0; i < sizeof controllers / sizeof *controllers; i++)
		write_at(root, "cgroup.subtree_control", controllers[i]);	/* what the kernel lacks, nobody finds */
	if (mkdirat(root, "container", 0755) < 0 || (group = openat(root, "container", O_PATH | O_CLOEXEC)) < 0)
		die(CANNOT_EXECUTE, "make", "the cgroup");
	for (unsigned long count = next_number(); count; count--) {
		char *file = next(), *value = next();
		if (write_at(group, file, value) < 0 && (errno != ENOENT || strncmp(file, "hugetlb.", 8)))
			die(CANNOT_EXECUTE, "set the cgroup's", file);	/* a kernel without huge pages limits them to none */
	}
	if (write_at(group, "cgroup.procs", "0") < 0 || unshare(CLONE_NEWCGROUP) < 0)
		die(CANNOT_EXECUTE, "enter", "the cgroup");
}

static void apply_personality(void)
{
	if (personality(next_number()) < 0)
		die(CANNOT_EXECUTE, "set", "the personality");
}

static void apply_sysctl(void)
{
	char *path = next();

	write_proc(path, next());
}

static void apply_hostname(void)
{
	char *name = next();

	if (sethostname(name, strlen(name)) < 0)
		die(CANNOT_EXECUTE, "sethostname", name);
}

static void apply_domainname(void)
{
	char *name = next();

	if (setdomainname(name, strlen(name)) < 0)
		die(CANNOT_EXECUTE, "setdomainname", name);
}

static void apply_rlimit(void)
{
	unsigned long resource = next_number();
	struct rlimit limit = { .rlim_cur = next_u64() };

	limit.rlim_max = next_u64();
	if (setrlimit(resource, &limit) < 0)
		die(CANNOT_EXECUTE, "set rlimit", decimal(resource));
}

static void apply_oom(void)
{
	write_proc("self/oom_score_adj", next());
}

static void apply_ioprio(void)
{
	if (syscall(SYS_ioprio_set, 1, 0, next_number()) < 0)	/* IOPRIO_WHO_PROCESS */
		die(CANNOT_EXECUTE, "set", "the I/O priority");
}

/* struct sched_attr of <linux/sched/types.h>, which no C library has */
static void apply_scheduler(void)
{
	struct {
		uint32_t size, policy;
		uint64_t flags;
		int32_t nice;
		uint32_t priority;
		uint64_t runtime, deadline, period;
	} attr = { .size = sizeof attr };

	attr.policy = next_number();
	attr.flags = next_u64();
	attr.nice = strtol(next(), NULL, 10);
	attr.priority = next_number();
	attr.runtime = next_u64();
	attr.deadline = next_u64();
	attr.period = next_u64();
	if (syscall(SYS_sched_setattr, 0, &attr, 0) < 0)
		die(CANNOT_EXECUTE, "set", "the scheduler");
}

static void apply_user(void)
{
	settings.uid = next_number();
	settings.gid = next_number();
	settings.umask = next_number();
}

static void apply_group(void)
{
	settings.groups = realloc(settings.groups, (settings.n_groups + 1) * sizeof *settings.groups);
	settings.groups[settings.n_groups++] = next_number();
}

static void apply_capabilities(void)
{
	settings.bounding = next_u64();
	settings.effective = next_u64();
	settings.inheritable = next_u64();
	settings.permitted = next_u64();
	settings.ambient = next_u64();
}

static void apply_no_new_privileges(void)
{
	settings.no_new_privileges = 1;
}

/*
 * A system call's number by its name, "-name" for 32-bit programs; one that does not exist if it is not known.  The
 * file is sorted, and so, nearly, is what is looked up: the search goes on where the last one has ended.
 */
static uint32_t find_syscall(const char *name)
{
	static char *table, *place;
	size_t len = strlen(name);

	if (!table)
		place = table = load(init_root, "etc/syscalls", NULL);
	for (int turn = 0; turn < 2; turn++, place = table)
		for (; *place; place = strchr(place, '\n') + 1)
			if (!strncmp(place, name, len) && place[len] == ' ')
				return strtoul(place + len, NULL, 10);
	return UINT32_MAX;
}

/* The filter's operands may be names of system calls; "max" and "-max": the highest of those, for what is newer. */
static void apply_seccomp(void)
{
	struct sock_filter *insn, *newer[2] = { NULL, NULL };
	uint32_t highest[2] = { 0, 0 };
	unsigned short count;

	settings.filter_flags = next_number();
	settings.filter.len = count = next_number();
	settings.filter.filter = insn = calloc(count, sizeof *insn);
	for (; count; count--, insn++) {
		insn->code = next_number();
		insn->jt = next_number();
		insn->jf = next_number();
		char *operand = next();
		int compat = *operand == '-';
		if (*operand >= '0' && *operand <= '9') {
			insn->k = strtoul(operand, NULL, 10);
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

static void apply_cwd(void)
{
	int missing;
	char *folder = resolve(settings.cwd = next(), &missing);

	if (missing)
		make_folders(folder);
}

static void apply_arg(void)
{
	append(&settings.args, &settings.n_args, next());
}

static void apply_env(void)
{
	append(&settings.env, &settings.n_env, next());
}

static void apply_state(void)
{
	hook_state = next();
}

static const struct {
	const char *keyword;
	void (*apply)(void);
} keywords[] = {
	{ "cgroup", apply_cgroup },		/* n (file value)... */
	{ "mount", apply_mount },		/* source target type flags data */
	{ "copy_up", apply_copy_up },		/* as mount */
	{ "node", apply_node },			/* path mode major minor uid gid */
	{ "link", apply_link },			/* content path */
	{ "terminal", open_terminal },
	{ "mask", apply_mask },			/* path */
	{ "readonly", apply_readonly },		/* path */
	{ "file_capability", apply_file_capability },	/* path below the share, length, bytes */
	{ "resolv_conf", apply_resolv_conf },
	{ "propagation", apply_propagation },	/* path flags */
	{ "sysctl", apply_sysctl },		/* path below /proc, value */
	{ "hostname", apply_hostname },		/* name */
	{ "domainname", apply_domainname },	/* name */
	{ "rlimit", apply_rlimit },		/* resource soft hard */
	{ "oom", apply_oom },			/* adjustment */
	{ "ioprio", apply_ioprio },		/* class << 13 | priority */
	{ "scheduler", apply_scheduler },	/* policy flags nice priority runtime deadline period */
	{ "user", apply_user },			/* uid gid umask */
	{ "group", apply_group },		/* gid */
	{ "capabilities", apply_capabilities },	/* bounding effective inheritable permitted ambient */
	{ "no_new_privileges", apply_no_new_privileges },
	{ "personality", apply_personality },	/* persona of personality(2) */
	{ "seccomp", apply_seccomp },		/* flags n (code jt jf k)... */
	{ "cwd", apply_cwd },			/* path */
	{ "arg", apply_arg },			/* string */
	{ "env", apply_env },			/* NAME=value */
	{ "hook", add_hook },			/* path timeout n args... n env... */
	{ "state", apply_state },		/* json, for hooks */
};

static void apply_config(void)
{
	while (config_next < config_end) {
		char *keyword = next();
		size_t i = 0;

		while (i < sizeof keywords / sizeof *keywords && strcmp(keyword, keywords[i].keyword))
			i++;
		if (i == sizeof keywords / sizeof *keywords) {
			errno = EPROTO;
			die(CANNOT_EXECUTE, "apply", keyword);
		}
		keywords[i].apply();
	}
}

static void set_capabilities(void)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];

	for (int half = 0; half < 2; half++)
		data[half] = (struct __user_cap_data_struct){
			settings.effective >> 32 * half, settings.permitted >> 32 * half, settings.inheritable >> 32 * half,
		};
	if (syscall(SYS_capset, &header, data) < 0)
		die(CANNOT_EXECUTE, "set", "the capabilities");
	for (int cap = 0; cap < 64; cap++)
		if (settings.ambient >> cap & 1 && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0) < 0)
			die(CANNOT_EXECUTE, "raise ambient capability", decimal(cap));
}

/* The filter holds for what is left to do here too. */
static void install_filter(void)
{
	if (settings.filter.len &&
	    syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, settings.filter_flags, &settings.filter) < 0)
		die(CANNOT_EXECUTE, "install", "the seccomp filter");
}

/* The user's home folder by the rootfs' passwd(5), "/" if it has none there. */
static char *find_home(void)
{
	int fd = open("/etc/passwd", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	char *uid = decimal(settings.uid), *text, *line;
	struct stat st;
	ssize_t len;

	if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || !(text = malloc(st.st_size + 1)))
		return "/";
	len = read(fd, text, st.st_size);
	text[len < 0 ? 0 : len] = 0;
	close(fd);
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
	char *home, *variable, **empty = NULL;

	for (size_t i = 0; i < settings.n_env; i++)
		if (!strncmp(settings.env[i], "HOME=", 5)) {
			if (settings.env[i][5])
				return;
			empty = &settings.env[i];
		}
	home = find_home();
	if (!(variable = malloc(strlen(home) + sizeof "HOME=")))
		die(CANNOT_EXECUTE, "set", "HOME");
	join(variable, strlen(home) + sizeof "HOME=", "HOME=", home, NULL);
	if (empty)
		*empty = variable;
	else
		append(&settings.env, &settings.n_env, variable);
}

/* The order is capabilities(7)'s: the bounding set while we may, the rest once the user is what it will be. */
static void become_user(void)
{
	umask(settings.umask);
	for (int fd = 0; fd <= 2; fd++)	/* so that the user may open /dev/stdout again, as under runc */
		if (fchown(fd, settings.uid, -1) < 0)
			die(CANNOT_EXECUTE, "chown", "a standard stream");
	for (int cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
		if (!(settings.bounding >> cap & 1) && prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) < 0)
			die(CANNOT_EXECUTE, "drop capability", decimal(cap));
	if (!settings.no_new_privileges)	/* while we have CAP_SYS_ADMIN */
		install_filter();
	prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0);
	if (setgroups(settings.n_groups, settings.groups) < 0 || setgid(settings.gid) < 0 || setuid(settings.uid) < 0)
		die(CANNOT_EXECUTE, "set", "the user and group ids");
	if (chdir(settings.cwd) < 0)
		die(CANNOT_EXECUTE, "chdir", settings.cwd);
	prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0);
	set_capabilities();
	if (!settings.no_new_privileges)
		return;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		die(CANNOT_EXECUTE, "set", "no new privileges");
	install_filter();
}

/* before: the signal mask that the process starts with. */
static void run_process(const sigset_t *before)
{
	init_root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	write_proc("self/oom_score_adj", "0");	/* init and this program are spared when memory runs out */
	enter_rootfs();
	apply_config();
	set_home();
	become_user();
	environ = settings.env;
	for (size_t i = 0; i < n_hooks; i++)
		run_hook(&hooks[i], i, before);
	sigprocmask(SIG_SETMASK, before, NULL);
	execvp(settings.args[0], settings.args);
	die(errno == ENOENT ? NOT_FOUND : CANNOT_EXECUTE, "exec", settings.args[0]);
}

/* ---- streams: pipes for the process, consoles towards the host ---- */

/*
 * A console is a tty and knows no end of file, so the process gets pipes and this loop carries
 * them.  hvc1: standard input and output, hvc2: standard error.  In the input the host escapes
 * with DLE: DLE DLE is that byte, DLE EOT the end.  What is behind back-pressures to what is before.
 */
enum { DLE = 0x10, EOT = 0x04 };
enum { EOF_DELAY = 50 };	/* milliseconds */

struct stream {
	int from, to;		/* -1: closed */
	size_t start, end;	/* what of buffer is still to be written */
	char buffer[4096];
};

static void close_source(struct stream *s)
{
	if (s->from >= 0)
		close(s->from);
	s->from = -1;
}

static void fill(struct stream *s)
{
	ssize_t n = read(s->from, s->buffer, sizeof s->buffer);

	s->start = 0;
	s->end = n > 0 ? n : 0;
	if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
		close_source(s);
}

static void flush(struct stream *s)
{
	ssize_t n = write(s->to, s->buffer + s->start, s->end - s->start);

	if (n > 0) {
		s->start += n;
	} else if (n < 0 && errno != EAGAIN && errno != EINTR) {
		s->start = s->end;	/* nobody reads it any more */
		close(s->to);
		s->to = -1;
	}
}

/* Decodes in place what fill() has read; returns 1 at the end of the input. */
static int decode(struct stream *s)
{
	static int escaped;
	size_t out = 0;

	for (size_t i = 0; i < s->end; i++) {
		char c = s->buffer[i];
		if (!escaped && c == DLE) {
			escaped = 1;
			continue;
		}
		if (escaped && c == EOT) {
			s->end = out;
			return 1;
		}
		escaped = 0;
		s->buffer[out++] = c;
	}
	s->end = out;
	return 0;
}

static int open_console(const char *path)
{
	struct termios raw;
	int fd = open(path, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);

	if (fd < 0 || tcgetattr(fd, &raw) < 0)
		die(CANNOT_EXECUTE, "open", path);
	cfmakeraw(&raw);
	if (tcsetattr(fd, TCSANOW, &raw) < 0)
		die(CANNOT_EXECUTE, "set the mode of", path);
	return fd;
}

/* The window size that the host has put into xenstore, as "rows columns". */
static void set_window_size(int master)
{
	char reply[XS_PAYLOAD_MAX + 1], *columns;
	struct winsize size = { 0 };

	if (master < 0 || xs_request(XS_READ, "data/winsize", NULL, reply) < 0)
		return;
	size.ws_row = strtoul(reply, &columns, 10);
	size.ws_col = strtoul(columns, NULL, 10);
	ioctl(master, TIOCSWINSZ, &size);
}

/* The container ends with its process, so all others are killed then.  Returns 1 when none is left. */
static int reap(pid_t process, int *status)
{
	pid_t pid;
	int wait_status;

	while ((pid = waitpid(-1, &wait_status, WNOHANG)) > 0)
		if (pid == process) {
			*status = WIFSIGNALED(wait_status) ? 128 + WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
			release_leases();
			kill(-1, SIGKILL);
		}
	return pid < 0 && errno == ECHILD;
}

/* Tells the host which streams have ended while the process lives; what was written before is in the rings then. */
static void tell_ended(int ended, int hvc1, int hvc2)
{
	char reply[XS_PAYLOAD_MAX + 1], text[4];

	tcdrain(hvc1);
	tcdrain(hvc2);
	join(text, sizeof text, ended & 1 ? "0" : "", ended & 2 ? "1" : "", ended & 4 ? "2" : "", NULL);
	xs_request(XS_WRITE, "data/ended", text, reply);
}

/* Closes the output streams that nobody reads on the host any more: the process gets SIGPIPE.  Returns 1 if there are. */
static int close_unread(struct stream *out, struct stream *err)
{
	char reply[XS_PAYLOAD_MAX + 1];

	if (xs_request(XS_READ, "data/unread", NULL, reply) < 0)
		return 0;
	if (strchr(reply, '1'))
		close_source(out);
	if (strchr(reply, '2'))
		close_source(err);
	return 1;
}

/* master: the terminal's, or -1.  Its end is a hang-up, so with the input it is closed for output too. */
static int carry(pid_t process, int signals, int master, struct stream *in, struct stream *out, struct stream *err)
{
	int status = 0, running = 1, at_end = 0, hung_up = 0, told = 0;
	int64_t since = 0;		/* when a stream ended of which the host has not been told; 0: none */

	while (running || out->from >= 0 || err->from >= 0 || out->start < out->end || err->start < err->end) {
		int in_pending = in->start < in->end, out_pending = out->start < out->end, err_pending = err->start < err->end;
		struct pollfd fds[] = {
			{ running ? signals : -1, POLLIN, 0 },
			{ in->to >= 0 && !in_pending ? in->from : -1, POLLIN, 0 },
			{ in_pending ? in->to : -1, POLLOUT, 0 },
			{ out_pending ? out->to : out->from, out_pending ? POLLOUT : POLLIN, 0 },
			{ err_pending ? err->to : err->from, err_pending ? POLLOUT : POLLIN, 0 },
		};

		/* a stream that has ended may be the process's end; the host hears of it if it is not */
		int ended = (in->to < 0 && !at_end) | (out->from < 0 && !out_pending) << 1 | (err->from < 0 && !err_pending) << 2;
		if (running && ended != told && master < 0)
			since = since ? since : milliseconds();
		if (since && milliseconds() - since >= EOF_DELAY) {
			tell_ended(told = ended, out->to, err->to);
			since = 0;
		}
		if (poll(fds, sizeof fds / sizeof *fds, since && running ? EOF_DELAY : -1) <= 0)
			continue;
		if (fds[0].revents) {
			struct signalfd_siginfo info;
			if (read(signals, &info, sizeof info) > 0 && info.ssi_signo == SIGWINCH) {
				set_window_size(master);
				hung_up = close_unread(out, err) && master >= 0;
			} else if (reap(process, &status))
				running = 0;
		}
		if (fds[1].revents) {
			fill(in);
			at_end = decode(in);
		}
		if (fds[2].revents)
			flush(in);
		if ((hung_up || (at_end && in->start >= in->end)) && in->to >= 0) {
			close(in->to);
			in->to = -1;
			if (master >= 0)
				close_source(out);
		}
		if (fds[3].revents)
			out_pending ? flush(out) : fill(out);
		if (fds[4].revents)
			err_pending ? flush(err) : fill(err);
	}
	return status;
}

/*
 * Takes what the child sends until its program runs or it has failed; returns 1 or 0.  master: of
 * the container's terminal, stays -1 if it has none.
 */
static int await_process(int child, int *master)
{
	union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } control;
	char text[MESSAGE_MAX];
	size_t len = 0;

	for (;;) {
		struct iovec iov = { text + len, sizeof text - 1 - len };
		struct msghdr message = {
			.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control,
		};
		ssize_t n = recvmsg(child, &message, MSG_CMSG_CLOEXEC);
		if (n <= 0)
			break;
		if (message.msg_controllen) {
			memcpy(master, CMSG_DATA(&control.header), sizeof *master);
			set_window_size(*master);
			write(child, "", 1);
		} else {
			len += n;
		}
	}
	close(child);
	text[len] = 0;
	if (len)
		tell_error(text);
	return !len;
}

/* The process runs: signals can be sent to it, and the host may send its input. */
static void announce(pid_t process)
{
	char reply[XS_PAYLOAD_MAX + 1], text[64];
	size_t len = join(text, sizeof text, decimal(process), " ", decimal(getpid()), "\n", NULL);
	int fd = open("/run/pid", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

	if (fd < 0 || write(fd, text, len) < 0)
		die(CANNOT_EXECUTE, "write", "/run/pid");
	close(fd);
	xs_request(XS_WRITE, "data/ready", "1", reply);
	/* what the host asked for before it could ring */
	if (xs_request(XS_DIRECTORY, "data/request", NULL, reply) > 0 && fork() == 0) {
		execl("/sbin/poweroff", "/sbin/poweroff", NULL);
		_exit(NOT_FOUND);
	}
}

static int enter_main(void)
{
	static struct stream in, out, err;
	int stdin_pipe[2], stdout_pipe[2], stderr_pipe[2], sockets[2], hvc1, hvc2, signals, status, master = -1;
	sigset_t handled, before;
	pid_t process;

	hvc1 = open_console("/dev/hvc1");
	hvc2 = open_console("/dev/hvc2");
	start_loopback();
	load_config();
	sigemptyset(&handled);
	sigaddset(&handled, SIGCHLD);
	sigaddset(&handled, SIGWINCH);
	sigprocmask(SIG_BLOCK, &handled, &before);
	prctl(PR_SET_CHILD_SUBREAPER, 1);	/* whoever loses its parent becomes ours to wait for */
	signals = signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signals < 0 || pipe2(stdin_pipe, O_CLOEXEC) < 0 || pipe2(stdout_pipe, O_CLOEXEC) < 0 ||
	    pipe2(stderr_pipe, O_CLOEXEC) < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) < 0)
		die(CANNOT_EXECUTE, "make", "the standard streams");
	process = syscall(SYS_clone, next_number() | SIGCHLD, NULL, NULL, NULL, NULL);	/* a fork(2) with namespaces */
	if (process < 0)
		die(CANNOT_EXECUTE, "fork", "the container's process");
	if (process == 0) {
		setsid();
		parent = sockets[1];
		dup2(stdin_pipe[0], 0);
		dup2(stdout_pipe[1], 1);
		dup2(stderr_pipe[1], 2);
		run_process(&before);
	}
	close(stdin_pipe[0]);
	close(stdout_pipe[1]);
	close(stderr_pipe[1]);
	close(sockets[1]);
	signal(SIGPIPE, SIG_IGN);
	in = (struct stream){ .from = hvc1, .to = stdin_pipe[1] };
	out = (struct stream){ .from = stdout_pipe[0], .to = hvc1 };
	err = (struct stream){ .from = stderr_pipe[0], .to = hvc2 };
	if (await_process(sockets[0], &master))
		announce(process);
	if (master >= 0) {
		dup3(master, in.to, O_CLOEXEC);
		dup3(master, out.from, O_CLOEXEC);
		close(master);
		master = out.from;
	}
	fcntl(in.to, F_SETFL, O_NONBLOCK);
	status = carry(process, signals, master, &in, &out, &err);
	tcdrain(hvc1);
	tcdrain(hvc2);
	return status;
}

/* ---- init: PID 1 of the VM ---- */

/*
 * It stays in the ramdisk: the kernel runs /sbin/poweroff, the doorbell, in PID 1's root, and that must never be a
 * program of the image.  Only enter's child goes into the container's rootfs.  Settings come from runX in /container, an
 * archive of its own before this one.
 */

static void finish(int status) __attribute__((noreturn));
static void finish(int status)
{
	char reply[XS_PAYLOAD_MAX + 1];

	xs_request(XS_WRITE, "data/exit", decimal(status), reply);
	reboot(RB_POWER_OFF);	/* never halt: on Arm that spins for ever */
	for (;;)
		pause();
}

static void fail(const char *sentence)
{
	char line[MESSAGE_MAX];

	write(2, line, join(line, sizeof line, "init: ", sentence, "\n", NULL));
	tell_error(sentence);
	finish(255);
}

/* The exit status of a child as a shell has it. */
static int wait_for(pid_t child)
{
	int status;

	if (child < 0)
		return 255;	/* it could not be made */
	while (waitpid(child, &status, 0) < 0)
		if (errno != EINTR)
			return 255;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Has the script /sbin/setup do what this word says; returns its exit status. */
static int set_up(const char *word)
{
	pid_t child = fork();

	if (child == 0) {
		execl("/sbin/setup", "setup", word, NULL);
		_exit(NOT_FOUND);
	}
	return wait_for(child);
}

/* Whether the kernel has killed a process because memory ran out. */
static int was_short_of_memory(void)
{
	static char text[1 << 15];
	int fd = open("/proc/vmstat", O_RDONLY | O_CLOEXEC);
	char *count;

	if (fd < 0 || read(fd, text, sizeof text - 1) < 0 || !(count = strstr(text, "\noom_kill ")))
		return 0;
	return count[sizeof "\noom_kill " - 1] != '0';
}

static int init_main(void)
{
	int status, modules, network;
	pid_t child;

	if (mount("dev", "/dev", "devtmpfs", 0, NULL) < 0 || mount("proc", "/proc", "proc", 0, NULL) < 0)
		fail("cannot mount /dev and /proc");
	/* With cache=mmap the page cache is written back late; a container that is killed should lose no more than it
	   would under runc, so late is one second. */
	write_at(AT_FDCWD, "/proc/sys/vm/dirty_expire_centisecs", "100");
	write_at(AT_FDCWD, "/proc/sys/vm/dirty_writeback_centisecs", "100");
	/* Looking for memory to compact twice a second is a quarter of what wakes an idle VM. */
	write_at(AT_FDCWD, "/proc/sys/vm/compaction_proactiveness", "0");
	/* As on a host, whose memory is larger than the container's limit: who asks for more than there is gets it, and
	   is killed when it is used. */
	write_at(AT_FDCWD, "/proc/sys/vm/overcommit_memory", "1");
	/* A container that takes all memory must not take the VM's own end with it. */
	write_at(AT_FDCWD, "/proc/self/oom_score_adj", "-1000");

	modules = is_there("/modules"), network = is_there("/proc/sys/net/ipv4/conf/eth0");
	if ((modules && set_up("modules")) || (network && set_up("network")))
		finish(255);
	/* The container's files are in the ramdisk, or dom0 exports them. */
	if (!is_there(SHARE "/rootfs") &&
	    mount("share", SHARE, "9p", 0, "trans=xen,version=9p2000.L,msize=131072,cache=mmap") < 0)
		fail("cannot mount the share over 9p");
	if (is_there("/container/disk") && set_up("disk"))
		finish(255);

	child = fork();
	if (child == 0)
		exit(enter_main());
	status = wait_for(child);
	if (was_short_of_memory())
		set_up("oom");
	/* The host may destroy the VM as soon as it reads the status, so what is dirty goes first; a file system that
	   was unmounted needs no repair. */
	sync();
	if (is_there("/container/disk") && umount(SHARE "/rootfs") < 0)
		mount(NULL, SHARE "/rootfs", NULL, MS_REMOUNT | MS_RDONLY, NULL);
	finish(status);
}

int main(int argc, char **argv)
{
	char *slash = strrchr(argv[0], '/'), *name = slash ? slash + 1 : argv[0];

	return !strcmp(name, "xs") ? xs_main(argc, argv) : !strcmp(name, "net") ? net_main() : init_main();
}

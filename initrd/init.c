/* SPDX-License-Identifier: Apache-2.0 */
/*
 * init:  PID 1 of the VM.  A child of it, the supervisor, starts the container's process and carries its streams.
 * xs:    the same program under a second name, one xenstore request from the shell.
 * net:   under a third one, sets up the VM's network interfaces as xenstore says.
 *
 * They do what busybox cannot: exact argv and environment, mounts that cannot leave the rootfs, credentials,
 * binary-safe streams; and, as a process costs a VM's start more than all else here, what every container needs.
 * What few need, the script /sbin/setup does.  All policy is in runx.py.
 * Nothing here decides anything about the host: the other end of the consoles checks what it reads.
 */
#include "init.h"
#include <linux/netlink.h>
#include <net/if.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>

/* ---- text, time and files ---- */

/* Joins the strings up to NULL in buffer, as far as it reaches; returns their length.  No stdio: it is half of libc. */
size_t join(char *buffer, size_t size, ...)
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

/* The digits stay until the fourth call from here. */
char *decimal(unsigned long number)
{
	static char digits[4][24];
	static int turn;
	char *end = digits[turn = (turn + 1) % 4] + 23;

	do
		*--end = '0' + number % 10;
	while (number /= 10);
	return end;
}

/* For what nobody can be told of if it fails. */
void put(int fd, const char *text, size_t len)
{
	if (write(fd, text, len) < 0)
		return;
}

int is_there(const char *path)
{
	return access(path, F_OK) == 0;
}

/* Returns 0, or -1. */
int write_at(int folder, const char *path, const char *value)
{
	int fd = openat(folder, path, O_WRONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : write(fd, value, strlen(value));

	if (fd >= 0)
		close(fd);
	return n < 0 ? -1 : 0;
}

int64_t milliseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64_C(1000) + now.tv_nsec / 1000000;
}

/* ---- errors ---- */

int parent = -1;

void die_with(int status, const char *message)
{
	put(2, message, strlen(message));
	if (parent >= 0)
		put(parent, message, strlen(message));
	else
		xs_write("data/error", message);
	_exit(status);
}

void die_as(int status, const char *operation, const char *object)
{
	char message[MESSAGE_MAX];

	join(message, sizeof message, operation, " ", object, ": ", strerror(errno), "\n", NULL);
	die_with(status, message);
}

void die(const char *operation, const char *object)
{
	die_as(CANNOT_EXECUTE, operation, object);
}

void refuse(int reason, const char *operation, const char *object)
{
	errno = reason;
	die(operation, object);
}

int check(int result, const char *operation, const char *object)
{
	if (result < 0)
		die(operation, object);
	return result;
}

/* ---- xenstore: the kernel's /dev/xen/xenbus, wire format of xen/include/public/io/xs_wire.h ---- */

struct xs_header { uint32_t type, req_id, tx_id, len; };

/* One request; the reply's payload goes to reply (NUL added).  Returns its length, or -1. */
int xs_request(uint32_t type, const char *path, const char *value, char *reply)
{
	struct { struct xs_header header; char payload[XS_REPLY_MAX]; } message;
	size_t path_len = strlen(path) + 1, value_len = strlen(value), have = 0;
	int fd, len = -1;

	if (path_len + value_len > XS_PAYLOAD_MAX || (fd = open("/dev/xen/xenbus", O_RDWR | O_CLOEXEC)) < 0)
		return -1;
	message.header = (struct xs_header){ .type = type, .len = path_len + value_len };
	memcpy(message.payload, path, path_len);
	memcpy(message.payload + path_len, value, value_len);
	if (write(fd, &message, sizeof message.header + message.header.len) < 0)
		goto out;
	do {
		ssize_t n = read(fd, (char *)&message + have, sizeof message.header + XS_PAYLOAD_MAX - have);
		if (n <= 0)
			goto out;
		have += n;
	} while (have < sizeof message.header || have < sizeof message.header + message.header.len);
	if (message.header.type == XS_ERROR)
		goto out;
	len = message.header.len;
	memcpy(reply, message.payload, len);
	reply[len] = 0;
out:
	close(fd);
	return len;
}

int xs_write(const char *path, const char *value)
{
	char reply[XS_REPLY_MAX];

	return xs_request(XS_WRITE, path, value, reply);
}

/* xs read PATH | write PATH VALUE | rm PATH | ls PATH.  Exit status 1 where xenstore refuses, 2 for another usage. */
static int xs_main(int argc, char **argv)
{
	char reply[XS_REPLY_MAX];
	const char *verb = argc > 2 ? argv[1] : "";
	uint32_t type = !strcmp(verb, "read") ? XS_READ : !strcmp(verb, "ls") ? XS_DIRECTORY :
			!strcmp(verb, "rm") ? XS_RM : !strcmp(verb, "write") ? XS_WRITE : 0;
	int len;

	if (!type || argc != (type == XS_WRITE ? 4 : 3))
		return 2;
	len = xs_request(type, argv[2], type == XS_WRITE ? argv[3] : "", reply);
	if (len < 0)
		return 1;
	for (int i = 0; type == XS_DIRECTORY && i < len; i++)
		reply[i] = reply[i] ? reply[i] : '\n';
	if (type == XS_READ)
		reply[len++] = '\n';
	if (type == XS_READ || type == XS_DIRECTORY)
		put(1, reply, len);
	return 0;
}

/* ---- net: interfaces, addresses and routes, as messages of rtnetlink(7) that runx.py has made ---- */

static unsigned char hex_byte(const char *hex)
{
	unsigned char byte = 0;

	for (int i = 0; i < 2; i++)
		byte = byte << 4 | (hex[i] >= 'a' ? hex[i] - 'a' + 10 : hex[i] - '0');
	return byte;
}

/* The number of the interface with a MAC address, which is 12 hexadecimal digits. */
static uint32_t find_interface(const char *mac)
{
	int fd = check(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "open", "a socket");
	struct ifreq request;

	for (int number = 1; number < 1024; number++) {
		int i = 0;
		request.ifr_ifindex = number;
		if (ioctl(fd, SIOCGIFNAME, &request) < 0 || ioctl(fd, SIOCGIFHWADDR, &request) < 0)
			continue;
		while (i < 6 && (unsigned char)request.ifr_hwaddr.sa_data[i] == hex_byte(mac + 2 * i))
			i++;
		if (i == 6) {
			close(fd);
			return number;
		}
	}
	refuse(ENODEV, "find the network interface", mac);
}

/* Sends a message, in hexadecimal with "@" for the interface's number, and dies if the kernel's answer is no. */
static void send_message(int netlink, const char *hex, uint32_t interface)
{
	char message[XS_PAYLOAD_MAX / 2 + sizeof interface];
	struct { struct nlmsghdr header; struct nlmsgerr error; char more[sizeof message]; } answer;
	size_t len = 0;

	for (const char *c = hex; *c && len + sizeof interface <= sizeof message;) {
		if (*c == '@') {
			memcpy(message + len, &interface, sizeof interface);
			len += sizeof interface;
			c++;
		} else {
			message[len++] = hex_byte(c);
			c += 2;
		}
	}
	check(send(netlink, message, len, 0), "send rtnetlink message", hex);
	check(recv(netlink, &answer, sizeof answer, 0), "get the answer to rtnetlink message", hex);
	if (answer.error.error)
		refuse(-answer.error.error, "apply rtnetlink message", hex);
}

/*
 * data/network/0, 1, ... in this order: a MAC address, then words that are messages, or files below /proc with what is
 * to be written to them: "sys/net/..=1".
 */
static int net_main(void)
{
	int netlink = check(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE), "open", "rtnetlink");
	int proc = check(open("/proc", O_PATH | O_CLOEXEC), "open", "/proc");
	char path[64], text[XS_REPLY_MAX], *value;

	for (unsigned long number = 0;; number++) {
		join(path, sizeof path, "data/network/", decimal(number), NULL);
		if (xs_request(XS_READ, path, "", text) < 0)
			return 0;
		uint32_t interface = find_interface(strtok(text, " "));
		for (char *word; (word = strtok(NULL, " "));) {
			if (!(value = strchr(word, '='))) {
				send_message(netlink, word, interface);
			} else {
				*value++ = 0;
				write_at(proc, word, value);	/* what this kernel has not, it need not be told */
			}
		}
	}
}

/* ---- scripts ---- */

/* For programs: the supervisor blocks SIGCHLD, which a shell waits for. */
void unblock_signals(void)
{
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

/* Returns the pid, or -1. */
pid_t start_script(const char *path, const char *word)
{
	pid_t child = fork();

	if (child == 0) {
		unblock_signals();
		execl(path, path, word, (char *)NULL);
		_exit(NOT_FOUND);
	}
	return child;
}

/* The exit status of a child as a shell has it. */
static int wait_for(pid_t child)
{
	int status;

	if (child < 0 || waitpid(child, &status, 0) < 0)
		return 255;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Has the script /sbin/setup do what this word says; returns its exit status. */
int set_up(const char *word)
{
	return wait_for(start_script("/sbin/setup", word));
}

/* ---- init: PID 1 of the VM ---- */

/*
 * It stays in the ramdisk: the kernel runs /sbin/poweroff, the doorbell, in PID 1's root, and that must never be a
 * program of the image.  Only the supervisor's child goes into the container's rootfs.  Settings come from runX in
 * /container, an archive of its own before this one.
 */

static const struct { const char *path, *value; } tuning[] = {
	/* With cache=mmap the page cache is written back late; a container that is killed should lose no more than it
	   would under runc, so late is one second. */
	{ "/proc/sys/vm/dirty_expire_centisecs", "100" },
	{ "/proc/sys/vm/dirty_writeback_centisecs", "100" },
	/* Looking for memory to compact twice a second is a quarter of what wakes an idle VM. */
	{ "/proc/sys/vm/compaction_proactiveness", "0" },
	/* As on a host, whose memory is larger than the container's limit: who asks for more than there is gets it, and
	   is killed when it is used. */
	{ "/proc/sys/vm/overcommit_memory", "1" },
	/* A container that takes all memory must not take the VM's own end with it. */
	{ "/proc/self/oom_score_adj", "-1000" },
};

static void finish(int status) __attribute__((noreturn));
static void finish(int status)
{
	xs_write("data/exit", decimal(status));
	reboot(RB_POWER_OFF);	/* never halt: on Arm that spins for ever */
	for (;;)
		pause();
}

static void fail(const char *sentence)
{
	char line[MESSAGE_MAX];

	put(2, line, join(line, sizeof line, "init: ", sentence, "\n", NULL));
	xs_write("data/error", sentence);
	finish(255);
}

/* Whether the kernel has killed a process because memory ran out.  /proc gives a page at a time. */
static int was_short_of_memory(void)
{
	static char text[1 << 15];
	int fd = open("/proc/vmstat", O_RDONLY | O_CLOEXEC);
	size_t len = 0;
	char *count;

	for (ssize_t n; (n = read(fd, text + len, sizeof text - 1 - len)) > 0;)
		len += n;
	close(fd);
	count = strstr(text, "\noom_kill ");
	return count && count[sizeof "\noom_kill " - 1] != '0';
}

static int init_main(void)
{
	int status, disk = is_there("/container/disk");
	pid_t supervisor;

	if (mount("dev", "/dev", "devtmpfs", 0, NULL) < 0 || mount("proc", "/proc", "proc", 0, NULL) < 0)
		fail("cannot mount /dev and /proc");
	for (size_t i = 0; i < COUNT(tuning); i++)
		write_at(AT_FDCWD, tuning[i].path, tuning[i].value);
	if ((is_there("/modules") && set_up("modules")) ||	/* which has told why, if it fails */
	    (is_there("/proc/sys/net/ipv4/conf/eth0") && set_up("network")))
		finish(255);
	/* The container's files are in the ramdisk, or dom0 serves them: to a kernel that is not ours over 9p. */
	if (!is_there(SHARE "/rootfs") && mount("share", SHARE, "xenfuse", 0, "") < 0 &&
	    (errno != ENODEV ||
	     mount("share", SHARE, "9p", 0, "trans=xen,version=9p2000.L,msize=131072,cache=mmap") < 0))
		fail("cannot mount the share");
	if (disk && set_up("disk"))
		finish(255);

	supervisor = fork();
	if (supervisor == 0)
		exit(supervise());
	if (supervisor < 0)
		fail("cannot fork the supervisor");
	status = wait_for(supervisor);
	if (was_short_of_memory())
		set_up("oom");
	/* The host may destroy the VM as soon as it reads the status, so what is dirty goes first; a file system that
	   was unmounted needs no repair. */
	sync();
	if (disk && umount(SHARE "/rootfs") < 0)
		mount(NULL, SHARE "/rootfs", NULL, MS_REMOUNT | MS_RDONLY, NULL);
	finish(status);
}

int main(int argc, char **argv)
{
	char *slash = strrchr(argv[0], '/'), *name = slash ? slash + 1 : argv[0];

	return !strcmp(name, "xs") ? xs_main(argc, argv) : !strcmp(name, "net") ? net_main() : init_main();
}

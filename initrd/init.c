/* SPDX-License-Identifier: Apache-2.0 */
/*
 * init:      PID 1 of the VM.  A child of it, the supervisor, starts the container's process and carries its streams.
 * poweroff:  the same program under a second name, the doorbell: does what the host asks for (doorbell.c).
 * xs:        under a third one, one xenstore request from the shell.
 * net:       sets up the VM's network interfaces as xenstore says (net.c).
 *
 * They do what busybox cannot: exact argv and environment, mounts that cannot leave the rootfs, credentials,
 * binary-safe streams; and, as a process costs a VM's start more than all else here, what every container needs.
 * What few need, the script /sbin/setup does.  All policy is in runx.py.
 * Nothing here decides anything about the host: the other end of the consoles checks what it reads.
 */
#include "init.h"
#include <poll.h>
#include <stdarg.h>
#include <sys/inotify.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
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

/* ---- errors ---- */

int parent = -1;
unsigned long process_number;

/* message: a sentence, without an end of line. */
void die_with(int status, const char *message)
{
	if (parent >= 0) {
		put(parent, message, strlen(message));
	} else {
		put(2, message, strlen(message));
		put(2, "\n", 1);
		if (process_number)
			end_exec(CANNOT_START, message);
		tell("error", message);
	}
	_exit(status);
}

void die_as(int status, const char *operation, const char *object)
{
	char message[MESSAGE_MAX];

	join(message, sizeof message, operation, " ", object, ": ", strerror(errno), NULL);
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

/* ---- time and events ---- */

int64_t milliseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64_C(1000) + now.tv_nsec / 1000000;
}

int64_t in_seconds(int count)
{
	return milliseconds() + count * INT64_C(1000);
}

/* Returns what can be read from when one of the events of inotify(7) is there. */
int watch(const char *path, uint32_t events)
{
	int fd = check(inotify_init1(IN_NONBLOCK | IN_CLOEXEC), "open", "inotify");

	check(inotify_add_watch(fd, path, events), "watch", path);
	return fd;
}

/* ---- xenstore: the kernel's /dev/xen/xenbus, wire format of xen/include/public/io/xs_wire.h ---- */

struct xs_header { uint32_t type, req_id, tx_id, len; };

struct xs_message { struct xs_header header; char payload[XS_REPLY_MAX]; };

/* Returns 0, or -1. */
static int xs_send(int fd, uint32_t type, const char *path, const char *value)
{
	struct xs_message message;
	size_t path_len = strlen(path) + 1, value_len = strlen(value);

	if (path_len + value_len > XS_PAYLOAD_MAX)
		return -1;
	message.header = (struct xs_header){ .type = type, .len = path_len + value_len };
	memcpy(message.payload, path, path_len);
	memcpy(message.payload + path_len, value, value_len);
	return write(fd, &message, sizeof message.header + message.header.len) < 0 ? -1 : 0;
}

static int read_exactly(int fd, void *buffer, size_t size)
{
	for (size_t have = 0; have < size;) {
		ssize_t n = read(fd, (char *)buffer + have, size - have);
		if (n <= 0)
			return -1;
		have += n;
	}
	return 0;
}

/* The payload of the next reply goes to reply (NUL added).  Returns its length, or -1. */
static int xs_receive(int fd, char *reply)
{
	struct xs_message message;

	if (read_exactly(fd, &message.header, sizeof message.header) < 0 || message.header.len > XS_PAYLOAD_MAX ||
	    read_exactly(fd, message.payload, message.header.len) < 0 || message.header.type == XS_ERROR)
		return -1;
	memcpy(reply, message.payload, message.header.len);
	reply[message.header.len] = 0;
	return message.header.len;
}

static int xs_open(void)
{
	return open("/dev/xen/xenbus", O_RDWR | O_CLOEXEC);
}

/* One request, and what xs_receive() says of it. */
int xs_request(uint32_t type, const char *path, const char *value, char *reply)
{
	int fd = xs_open(), len = xs_send(fd, type, path, value) < 0 ? -1 : xs_receive(fd, reply);

	close(fd);
	return len;
}

int xs_write(const char *path, const char *value)
{
	char reply[XS_REPLY_MAX];

	return xs_request(XS_WRITE, path, value, reply);
}

/* Has what changes at a path be told, and at once too.  fd: of another watch, or -1.  Returns what to read from. */
static int xs_watch(int fd, const char *path)
{
	struct { struct xs_header header; char payload[128]; } message;
	size_t len = join(message.payload, sizeof message.payload - 2, path, NULL) + 1;

	message.payload[len++] = 0;	/* the token */
	message.header = (struct xs_header){ .type = XS_WATCH, .len = len };
	if (fd < 0)
		fd = check(open("/dev/xen/xenbus", O_RDWR | O_NONBLOCK | O_CLOEXEC), "open", "/dev/xen/xenbus");
	check(write(fd, &message, sizeof message.header + len), "watch xenstore's", path);
	return fd;
}

/* The nodes of the process that this is about. */
static const char *node_of(const char *name)
{
	static char path[64];

	join(path, sizeof path, "data/process/", decimal(process_number), "/", name, NULL);
	return path;
}

/* Returns -1 also where the host has taken an exec's consoles away: the nodes may be of another one already. */
int tell(const char *name, const char *value)
{
	return process_number && is_withdrawn() ? -1 : xs_write(node_of(name), value);
}

/*
 * The same, and lists a folder then, with one wait for both; by a file each, for the kernel sends a request from the
 * buffer of its file.  Returns -1 as tell(), else the length of the list.
 */
int tell_and_list(const char *name, const char *value, const char *folder, char *reply)
{
	int first = process_number && is_withdrawn() ? -1 : xs_open(), second = xs_open(), len = -1;

	if (xs_send(first, XS_WRITE, node_of(name), value) == 0 && xs_send(second, XS_DIRECTORY, folder, "") == 0 &&
	    xs_receive(first, reply) >= 0) {
		len = xs_receive(second, reply);
		len = len < 0 ? 0 : len;
	}
	close(first);
	close(second);
	return len;
}

/* Returns the value's length, or -1. */
int ask(const char *name, char *reply)
{
	return xs_request(XS_READ, node_of(name), "", reply);
}

/* ---- devices, and what else is waited for ---- */

enum { SILENCE = 1000 };	/* milliseconds */

/*
 * The kernel looks for devices once, and only then watches for more: of those that come in between it hears when
 * something is written below their nodes.
 */
static void show_devices(void)
{
	char kinds[XS_REPLY_MAX], numbers[XS_REPLY_MAX], path[64];
	int kinds_len = xs_request(XS_DIRECTORY, "device", "", kinds), len;

	for (char *kind = kinds; kind < kinds + kinds_len; kind += strlen(kind) + 1) {
		join(path, sizeof path, "device/", kind, NULL);
		len = xs_request(XS_DIRECTORY, path, "", numbers);
		for (char *number = numbers; number < numbers + len; number += strlen(number) + 1) {
			join(path, sizeof path, "device/", kind, "/", number, "/shown", NULL);
			xs_write(path, "1");
		}
	}
}

/*
 * Waits until one of two descriptors, either may be -1, has something to read, and reads it: all that it says is
 * that it is worth looking again.  Watch first, look, and then wait, so that nothing is missed.  end: when to fail with
 * the sentence, by milliseconds(); negative: never, and it is not about a device.
 */
void await_event(int fd, int other, int64_t end, const char *sentence)
{
	struct pollfd fds[] = { { fd, POLLIN, 0 }, { other, POLLIN, 0 } };
	int64_t left = end - milliseconds();
	char events[4096];

	if (end >= 0 && left <= 0)
		die_with(CANNOT_START, sentence);
	/* those of other processes come when the kernel has long watched */
	if (poll(fds, 2, end < 0 ? -1 : left < SILENCE ? left : SILENCE) == 0 && !process_number)
		show_devices();
	for (int i = 0; i < 2; i++)
		while (fds[i].revents && read(fds[i].fd, events, sizeof events) > 0)
			;
}

/*
 * The first call only begins to watch: who looks once more misses nothing, and what is there already costs no watch.
 * The others wait.  end: as above.
 */
void await_change(struct awaited *it, int64_t end)
{
	if (it->is_watched) {
		await_event(it->changes, it->files, end, it->sentence);
		return;
	}
	it->is_watched = 1;
	it->files = it->folder ? watch(it->folder, IN_CREATE) : -1;
	it->changes = -1;
	for (int i = 0; i < 2; i++)
		if (it->nodes[i])
			it->changes = xs_watch(it->changes, it->nodes[i]);
}

void end_watch(struct awaited *it)
{
	if (it->is_watched) {
		close(it->files);
		close(it->changes);
	}
}

/* xs read PATH | write PATH VALUE.  Exit status 1 where xenstore refuses, 2 for another usage. */
static int xs_main(int argc, char **argv)
{
	char reply[XS_REPLY_MAX];
	int len;

	if (argc == 4 && !strcmp(argv[1], "write"))
		return xs_write(argv[2], argv[3]) < 0;
	if (argc != 3 || strcmp(argv[1], "read"))
		return 2;
	len = xs_request(XS_READ, argv[2], "", reply);
	if (len < 0)
		return 1;
	reply[len++] = '\n';
	put(1, reply, len);
	return 0;
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
		signal(SIGPIPE, SIG_DFL);
		execl(path, path, word, (char *)NULL);
		_exit(NOT_FOUND);
	}
	return child;
}

/* The exit status of a child as a shell has it.  Others that end before are reaped too, if this is PID 1. */
static int wait_for(pid_t child)
{
	pid_t pid;
	int status;

	if (child < 0)
		return CANNOT_START;
	while ((pid = waitpid(getpid() == 1 ? -1 : child, &status, 0)) != child)
		if (pid < 0 && errno != EINTR)
			return CANNOT_START;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Has the script /sbin/setup do what this word says, but for "net", which needs none; returns its exit status. */
int set_up(const char *word)
{
	return wait_for(start_script(strcmp(word, "net") ? "/sbin/setup" : "/sbin/net", word));
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
	/* As systemd sets it on a host: no process may have a higher RLIMIT_NOFILE. */
	{ "/proc/sys/fs/nr_open", "1073741816" },
	/* A container that takes all memory must not take the VM's own end with it. */
	{ "/proc/self/oom_score_adj", "-1000" },
};

static void finish(int status) __attribute__((noreturn));
static void finish(int status)
{
	tell("exit", decimal(status));
	reboot(RB_POWER_OFF);	/* never halt: on Arm that spins for ever */
	for (;;)
		pause();
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
	char requests[XS_REPLY_MAX];
	pid_t supervisor;
	int status;

	if (mount("dev", "/dev", "devtmpfs", 0, NULL) < 0 || mount("proc", "/proc", "proc", 0, NULL) < 0 ||
	    mkdir(PROCESSES, 0700) < 0 || note_process(0, 0, 0) < 0 || mknod(BELL, S_IFREG | 0600, 0) < 0) {
		tell("error", "cannot mount /dev and /proc");
		finish(CANNOT_START);
	}
	for (size_t i = 0; i < COUNT(tuning); i++)
		write_at(AT_FDCWD, tuning[i].path, tuning[i].value);
	supervisor = fork();
	if (supervisor == 0)
		_exit(supervise());
	if (supervisor < 0)
		tell("error", "cannot fork the supervisor");
	if (xs_request(XS_DIRECTORY, "data/request", "", requests) > 0)	/* from before the doorbell could act */
		start_script("/sbin/poweroff", NULL);
	status = wait_for(supervisor);
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

	/* An image may name /proc/self/exe as its program, and that is this one. */
	return !strcmp(name, "poweroff") ? doorbell_main() : !strcmp(name, "xs") ? xs_main(argc, argv) :
	       !strcmp(name, "net") ? net_main() : !strcmp(name, "init") ? init_main() : CANNOT_EXECUTE;
}

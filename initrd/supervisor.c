/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The supervisor: brings about all that the container's process needs, starts it, carries its streams, and ends with
 * its exit status.  The VM is there before the container is started: until the host says so, nothing is read from the
 * rootfs, and nothing is mounted in it, for the host's side may still change it.
 */
#include "init.h"
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>

enum { DEVICE_WAIT = 60 };	/* seconds */

/* ---- a process ---- */

/* For carry().  before: the mask that the process starts with. */
int catch_signals(sigset_t *before)
{
	sigset_t handled;

	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&handled);
	sigaddset(&handled, SIGCHLD);
	sigaddset(&handled, SIGWINCH);
	check(sigprocmask(SIG_BLOCK, &handled, before), "block", "signals");
	return check(signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK), "open", "a signalfd");
}

/*
 * Forks what becomes the process, with pipes as its streams.  flags: of clone(2), for namespaces.  *child: the other
 * end of its parent, by which it hears when to go on: see enter_container().
 */
pid_t start_process(unsigned long flags, const sigset_t *before, int *child)
{
	int pipes[3][2], sockets[2];
	pid_t pid;

	check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets), "make", "a socket pair");
	for (int i = 0; i < 3; i++)
		check(pipe2(pipes[i], O_CLOEXEC), "make", "the standard streams");
	pid = syscall(SYS_clone, flags | SIGCHLD, NULL, NULL, NULL, NULL);	/* a fork(2) with namespaces */
	if (check(pid, "fork", "the process") == 0) {
		parent = sockets[1];
		close(sockets[0]);	/* so that it hears when the supervisor has ended */
		signal(SIGPIPE, SIG_DFL);
		check(setsid(), "make", "a session");
		for (int i = 0; i < 3; i++)
			check(dup2(pipes[i][i != 0], i), "set", "the standard streams");
		run_process(before);
	}
	close(sockets[1]);
	for (int i = 0; i < 3; i++)
		close(pipes[i][i != 0]);
	set_pipes(pipes[0][1], pipes[1][0], pipes[2][0]);
	*child = sockets[0];
	return pid;
}

/*
 * Takes what comes from the process until it executes its program: the master of a terminal, which gets an answer, or a
 * sentence on what went wrong.  Returns whether the program runs.
 */
static int await_process(pid_t pid, int child)
{
	union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } control;
	char text[MESSAGE_MAX];
	size_t len = 0;
	int master;

	for (;;) {
		struct iovec iov = { text + len, sizeof text - 1 - len };
		struct msghdr message = {
			.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control,
		};
		await_word(child, pid);
		ssize_t n = recvmsg(child, &message, MSG_CMSG_CLOEXEC);
		if (n <= 0)
			break;
		if (message.msg_controllen) {
			memcpy(&master, CMSG_DATA(&control.header), sizeof master);
			set_terminal(master);
			put(child, "", 1);
		} else {
			len += n;
		}
	}
	close(child);
	text[len] = 0;
	if (len)
		tell("error", text);
	return !len;
}

/* Signals can be sent to the process, and the host may send its input.  What cannot be announced does not run. */
static void announce(pid_t pid)
{
	char reply[XS_REPLY_MAX];
	int requests = note_process(process_number, pid, getpid());

	if (requests == 0)
		requests = tell_and_list("ready", "1", "data/request", reply);
	/* and what the host asked for before it could ring */
	if (requests < 0 || (requests > 0 && start_script("/sbin/poweroff", NULL) < 0)) {
		kill(pid, SIGKILL);
		die("announce", "the process");
	}
}

/* Has it go on.  Returns its exit status once it has ended; if it could not be executed, its error has been told. */
int follow_process(pid_t pid, int child, int signals)
{
	int status, runs;

	put(child, "", 1);
	runs = await_process(pid, child);
	if (runs)
		announce(pid);
	status = carry(pid, signals);
	return runs || !process_number ? status : CANNOT_START;
}

/* ---- what the container needs ---- */

/* A container without any network has its own loopback too, as under runc. */
static void start_loopback(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq request = { .ifr_name = "lo", .ifr_flags = IFF_UP };

	ioctl(fd, SIOCSIFFLAGS, &request);	/* fails in a kernel without a network */
	close(fd);
}

static int is_connected(const char *state)
{
	char reply[XS_REPLY_MAX];

	return xs_request(XS_READ, state, "", reply) > 0 && !strcmp(reply, "4");	/* XenbusStateConnected */
}

/* The files that dom0 serves: to a kernel that is not ours over 9p. */
static void mount_share(void)
{
	struct awaited share = {
		.sentence = "the container's files are not there: nobody serves them, or the kernel has no driver for "
			    "them",
		.nodes = { "device/fuse/0/state", "device/9pfs/0/state" },
	};
	int64_t end = in_seconds(DEVICE_WAIT);
	int is_fuse, result;

	while (!(is_fuse = is_connected(share.nodes[0])) && !is_connected(share.nodes[1]))
		await_change(&share, end);
	end_watch(&share);
	result = is_fuse ? mount("share", SHARE, "xenfuse", 0, "") :
		 mount("share", SHARE, "9p", 0, "trans=xen,version=9p2000.L,msize=131072,cache=mmap");
	if (result < 0)
		die_as(CANNOT_START, "mount", "the share");
}

static void await_disk(void)
{
	struct awaited disk = {
		.sentence = "there is no /dev/xvda: the kernel needs its driver, xen-blkfront", .folder = "/dev",
	};
	int64_t end = in_seconds(DEVICE_WAIT);

	while (!is_there("/dev/xvda"))
		await_change(&disk, end);
	end_watch(&disk);
}

/* Waits for the container's start, however long; what is to be set up then are words. */
static void await_start(void)
{
	struct awaited start = { .nodes = { "data/process/0/start" } };
	char words[XS_REPLY_MAX];

	while (ask("start", words) <= 0)
		await_change(&start, -1);	/* it is watched on: the end of that is a question to the host */
	for (char *word = strtok(words, " "); word; word = strtok(NULL, " ")) {
		if (!strcmp(word, "disk"))
			await_disk();
		if (strcmp(word, "-") && set_up(word))
			_exit(CANNOT_START);	/* it has told why */
	}
}

/* Returns the exit status of the container's process. */
int supervise(void)
{
	int64_t end = in_seconds(DEVICE_WAIT);
	int signals, child, input, output;
	sigset_t before;
	pid_t pid;

	if (is_there("/modules") && set_up("modules"))
		_exit(CANNOT_START);
	signals = catch_signals(&before);
	check(prctl(PR_SET_CHILD_SUBREAPER, 1), "become", "a subreaper");	/* orphans are waited for too */
	pid = start_process(load_config(), &before, &child);
	input = open_console(1, end);
	output = check(fcntl(input, F_DUPFD_CLOEXEC, 0), "open", "the console");
	set_consoles(input, output, open_console(2, end));
	start_loopback();
	if (!is_there(SHARE "/rootfs"))	/* they are not in the ramdisk */
		mount_share();
	await_start();
	return follow_process(pid, child, signals);
}

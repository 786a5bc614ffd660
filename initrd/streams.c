/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The supervisor: starts the container's process, carries its standard streams between pipes, or a terminal, and the
 * consoles towards the host, and ends with its exit status.
 *
 * A console is a tty and knows no end of file, so the process gets pipes.  hvc1: standard input and output, hvc2:
 * standard error.  In the input the host escapes with DLE: DLE DLE is that byte, DLE EOT the end.  What is behind
 * back-pressures to what is before.
 */
#include "init.h"
#include <net/if.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>

enum { DLE = 0x10, EOT = 0x04 };
enum { EOF_DELAY = 50 };	/* milliseconds */

struct stream {
	int from, to;		/* -1: closed */
	size_t start, end;	/* what of buffer is still to be written */
	char buffer[4096];
};

static struct stream streams[3], *const in = &streams[0], *const out = &streams[1], *const err = &streams[2];
static int terminal;		/* in->to and out->from are its master */
static int at_end;		/* the host has said that no input follows */
static int hung_up;		/* nobody is at the terminal any more */

/* ---- one stream ---- */

static int is_pending(const struct stream *s)
{
	return s->start < s->end;
}

static void close_end(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void close_stream(struct stream *s)
{
	s->start = s->end;
	close_end(&s->from);
	close_end(&s->to);
}

static void fill(struct stream *s)
{
	ssize_t n = read(s->from, s->buffer, sizeof s->buffer);

	s->start = 0;
	s->end = n > 0 ? n : 0;
	if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
		close_end(&s->from);
}

static void flush(struct stream *s)
{
	ssize_t n = write(s->to, s->buffer + s->start, s->end - s->start);

	if (n > 0)
		s->start += n;
	else if (n < 0 && errno != EAGAIN && errno != EINTR)
		close_stream(s);	/* nobody reads it any more */
}

/* Decodes in place what fill() has read; returns 1 at the end of the input. */
static int decode(struct stream *s)
{
	static int escaped;
	size_t len = 0, end = s->end;

	for (size_t i = 0; i < end; i++) {
		char c = s->buffer[i];
		s->end = len;
		if (escaped && c == EOT)
			return 1;
		escaped = !escaped && c == DLE;
		if (!escaped)
			s->buffer[len++] = c;
	}
	s->end = len;
	return 0;
}

static int open_console(const char *path)
{
	struct termios raw;
	int fd = check(open(path, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC), "open", path);

	check(tcgetattr(fd, &raw), "open", path);
	cfmakeraw(&raw);
	check(tcsetattr(fd, TCSANOW, &raw), "set the mode of", path);
	return fd;
}

/* ---- what the host asks for and is told ---- */

/* The window size that the host has put into xenstore, as "rows columns". */
static void set_window_size(void)
{
	char reply[XS_REPLY_MAX], *columns;
	struct winsize size = { 0 };

	if (!terminal || xs_request(XS_READ, "data/winsize", "", reply) < 0)
		return;
	size.ws_row = strtoul(reply, &columns, 10);
	size.ws_col = strtoul(columns, NULL, 10);
	ioctl(out->from, TIOCSWINSZ, &size);
}

/* Closes the output streams that nobody reads on the host any more: the process gets SIGPIPE. */
static void close_unread(void)
{
	char reply[XS_REPLY_MAX];

	if (xs_request(XS_READ, "data/unread", "", reply) < 0)
		return;
	hung_up = terminal;
	for (int i = 1; i < 3; i++)
		if (strchr(reply, '0' + i))
			close_end(&streams[i].from);
}

/*
 * Tells the host which streams have ended while the process lives; what was written before is in the rings then.  One
 * that has just ended may be the process's end, of which the host hears anyway.  Returns for how many milliseconds to
 * wait before the next call, or -1.
 */
static int tell_ended(void)
{
	static char told[4];
	static int64_t since;	/* when a stream ended of which the host has not been told; 0: none */
	char text[4];

	join(text, sizeof text, in->to < 0 && !at_end ? "0" : "", out->from < 0 && !is_pending(out) ? "1" : "",
	     err->from < 0 && !is_pending(err) ? "2" : "", NULL);
	if (terminal || !strcmp(text, told))
		return -1;
	since = since ? since : milliseconds();
	if (milliseconds() - since < EOF_DELAY)
		return EOF_DELAY;
	tcdrain(out->to);
	tcdrain(err->to);
	xs_write("data/ended", strcpy(told, text));
	since = 0;
	return -1;
}

/* The container ends with its process, so all others are killed then.  Returns whether any is left. */
static int reap(pid_t process, int *status)
{
	pid_t pid;
	int wait_status;

	while ((pid = waitpid(-1, &wait_status, WNOHANG)) > 0)
		if (pid == process) {
			*status = WIFSIGNALED(wait_status) ? 128 + WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
			if (is_there("/run/dhcp"))
				set_up("release");
			kill(-1, SIGKILL);
		}
	return pid == 0 || errno != ECHILD;
}

/* SIGWINCH: the host asks for a look.  SIGCHLD: see reap(). */
static int handle_signal(int signals, pid_t process, int *status)
{
	struct signalfd_siginfo info;

	if (read(signals, &info, sizeof info) < 0 || info.ssi_signo != SIGWINCH)
		return reap(process, status);
	set_window_size();
	close_unread();
	return 1;
}

/* Carries until all processes and the output have ended; returns the exit status of the container's. */
static int carry(pid_t process, int signals)
{
	int status = 0, running = 1;

	while (running || out->from >= 0 || err->from >= 0 || is_pending(out) || is_pending(err)) {
		struct pollfd fds[4] = { [3] = { running ? signals : -1, POLLIN, 0 } };

		for (int i = 0; i < 3; i++)
			fds[i] = is_pending(&streams[i]) ? (struct pollfd){ streams[i].to, POLLOUT, 0 } :
							   (struct pollfd){ streams[i].from, POLLIN, 0 };
		if (poll(fds, 4, running ? tell_ended() : -1) <= 0)
			continue;
		if (fds[3].revents)
			running = handle_signal(signals, process, &status);
		for (int i = 0; i < 3; i++) {
			if (fds[i].revents && is_pending(&streams[i])) {
				flush(&streams[i]);
			} else if (fds[i].revents) {
				fill(&streams[i]);
				at_end = i == 0 ? decode(in) : at_end;
			}
		}
		if (hung_up || (at_end && !is_pending(in))) {
			close_stream(in);
			if (terminal)	/* its end is a hang-up */
				close_end(&out->from);
		}
	}
	tcdrain(out->to);
	tcdrain(err->to);
	return status;
}

/* ---- the process ---- */

/* A container without any network has its own loopback too, as under runc. */
static void start_loopback(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq request = { .ifr_name = "lo", .ifr_flags = IFF_UP };

	ioctl(fd, SIOCSIFFLAGS, &request);	/* fails in a kernel without a network */
	close(fd);
}

/* Forks the process, with pipes as its streams.  *child: the other end of its parent. */
static pid_t start_process(const sigset_t *before, int *child)
{
	unsigned long namespaces = load_config();
	int pipes[3][2], sockets[2];
	pid_t process;

	check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets), "make", "a socket pair");
	for (int i = 0; i < 3; i++)
		check(pipe2(pipes[i], O_CLOEXEC), "make", "the standard streams");
	process = syscall(SYS_clone, namespaces | SIGCHLD, NULL, NULL, NULL, NULL);	/* a fork(2) with namespaces */
	if (check(process, "fork", "the container's process") == 0) {
		parent = sockets[1];
		check(setsid(), "make", "a session");
		for (int i = 0; i < 3; i++)
			check(dup2(pipes[i][i != 0], i), "set", "the standard streams");
		run_process(before);
	}
	close(sockets[1]);
	for (int i = 0; i < 3; i++)
		close(pipes[i][i != 0]);
	in->to = pipes[0][1];
	out->from = pipes[1][0];
	err->from = pipes[2][0];
	*child = sockets[0];
	return process;
}

/* The master of the process's terminal takes the place of two pipes. */
static void use_terminal(int master)
{
	check(dup3(master, in->to, O_CLOEXEC), "carry", "the terminal");
	check(dup3(master, out->from, O_CLOEXEC), "carry", "the terminal");
	close(master);
	terminal = 1;
	set_window_size();
}

/*
 * Takes what comes from the process until it executes its program: the master of a terminal, which gets an answer, or a
 * sentence on what went wrong.  Returns whether the program runs.
 */
static int await_process(int child)
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
		ssize_t n = recvmsg(child, &message, MSG_CMSG_CLOEXEC);
		if (n <= 0)
			break;
		if (message.msg_controllen) {
			memcpy(&master, CMSG_DATA(&control.header), sizeof master);
			use_terminal(master);
			put(child, "", 1);
		} else {
			len += n;
		}
	}
	close(child);
	text[len] = 0;
	if (len)
		xs_write("data/error", text);
	return !len;
}

/* Signals can be sent to the process, and the host may send its input. */
static void announce(pid_t process)
{
	char reply[XS_REPLY_MAX], text[64];
	size_t len = join(text, sizeof text, decimal(process), " ", decimal(getpid()), "\n", NULL);
	int fd = check(open("/run/pid", O_WRONLY | O_CREAT | O_CLOEXEC, 0600), "open", "/run/pid");

	check(write(fd, text, len), "write", "/run/pid");
	close(fd);
	check(xs_write("data/ready", "1"), "write", "data/ready");
	/* what the host asked for before it could ring */
	if (xs_request(XS_DIRECTORY, "data/request", "", reply) > 0)
		check(start_script("/sbin/poweroff", NULL), "fork", "/sbin/poweroff");
}

/* Returns the exit status of the container's process. */
int supervise(void)
{
	sigset_t handled, before;
	int signals, child;
	pid_t process;

	in->from = open_console("/dev/hvc1");
	out->to = open_console("/dev/hvc1");
	err->to = open_console("/dev/hvc2");
	start_loopback();
	sigemptyset(&handled);
	sigaddset(&handled, SIGCHLD);
	sigaddset(&handled, SIGWINCH);
	check(sigprocmask(SIG_BLOCK, &handled, &before), "block", "signals");
	signals = check(signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK), "open", "a signalfd");
	check(prctl(PR_SET_CHILD_SUBREAPER, 1), "become", "a subreaper");	/* orphans are waited for too */
	process = start_process(&before, &child);
	signal(SIGPIPE, SIG_IGN);
	if (await_process(child))
		announce(process);
	check(fcntl(in->to, F_SETFL, O_NONBLOCK), "set", "the standard input");
	return carry(process, signals);
}

/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A process's standard streams, carried between pipes, or a terminal, and consoles towards the host until it has ended.
 *
 * A console is a tty and knows no end of file, so the process gets pipes.  The process N has the consoles 2N + 1, for
 * standard input and output, and 2N + 2, for standard error.  In the input the host escapes with DLE: DLE DLE is that
 * byte, DLE EOT the end.  What is behind back-pressures to what is before.
 */
#include "init.h"
#include <poll.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <termios.h>

enum { DLE = 0x10, EOT = 0x04 };
enum { EOF_DELAY = 50, LEFT_WAIT = 2000 };	/* milliseconds */
enum { TERMINAL_MAX = 1 << 16 };	/* bytes; a terminal holds no more */

struct stream {
	int from, to;		/* -1: closed */
	size_t start, end;	/* what of buffer is still to be written */
	int left;		/* bytes that are still to be read, once the process has ended */
	char buffer[4096];
};

static struct stream streams[3], *const in = &streams[0], *const out = &streams[1], *const err = &streams[2];
static int terminal;		/* in->to and out->from are its master */
static int at_end;		/* the host has said that no input follows */
static int hung_up;		/* nobody is at the terminal any more */
static int running;		/* the process */
static int opened = -1;		/* can be read when something in the container has opened the terminal */
static int deserted;		/* nothing there has it open */

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
	if (n < 0 && errno == EIO && s == out && terminal && running)
		deserted = 1;	/* for now */
	else if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
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

/*
 * Console N, once the kernel has found it and says so to the host: before that the file may be there already, or be
 * that of an earlier console of this number.
 */
int open_console(unsigned long number, int64_t end)
{
	char path[64], node[64], sentence[128], state[XS_REPLY_MAX];
	struct awaited console = { .sentence = sentence, .folder = "/dev", .nodes = { node } };
	int fd;
	struct termios raw;

	join(path, sizeof path, "/dev/hvc", decimal(number), NULL);
	join(node, sizeof node, "device/console/", decimal(number), "/state", NULL);
	join(sentence, sizeof sentence, "there is no ", path, ": the kernel needs its driver, hvc_xen", NULL);
	while (xs_request(XS_READ, node, "", state) <= 0 || (*state != '3' && *state != '4') ||
	       (fd = open(path, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC)) < 0)
		await_change(&console, end);
	end_watch(&console);
	check(tcgetattr(fd, &raw), "open", path);
	cfmakeraw(&raw);
	check(tcsetattr(fd, TCSANOW, &raw), "set the mode of", path);
	return fd;
}

/* Of the consoles, the third may be -1. */
void set_consoles(int input, int output, int errors)
{
	in->from = input;
	out->to = output;
	err->to = errors;
}

/* Whether the host has taken the consoles away; not before they were there. */
int is_withdrawn(void)
{
	struct pollfd console = { out->to, POLLOUT, 0 };

	return out->to < 0 || (poll(&console, 1, 0) == 1 && console.revents & (POLLHUP | POLLERR));
}

/* Waits for what a process tells before its program runs.  That of an exec is killed as in carry(). */
void await_word(int fd, pid_t pid)
{
	struct pollfd fds[] = { { fd, POLLIN, 0 }, { process_number ? out->to : -1, 0, 0 } };

	if (poll(fds, COUNT(fds), -1) > 0 && fds[1].revents)
		kill(pid, SIGKILL);
}

/* The other ends of the process's pipes. */
void set_pipes(int input, int output, int errors)
{
	in->to = input;
	out->from = output;
	err->from = errors;
}

/* ---- what the host asks for and is told ---- */

/* The window size that the host has put into xenstore, as "rows columns". */
static void set_window_size(void)
{
	char reply[XS_REPLY_MAX], *columns;
	struct winsize size = { 0 };

	if (!terminal || ask("winsize", reply) < 0)
		return;
	size.ws_row = strtoul(reply, &columns, 10);
	size.ws_col = strtoul(columns, NULL, 10);
	ioctl(out->from, TIOCSWINSZ, &size);
}

/* The master of the process's terminal takes the place of two pipes. */
void set_terminal(int master)
{
	int slave = check(ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC), "open", "the terminal");
	char path[64];

	join(path, sizeof path, "/proc/self/fd/", decimal(slave), NULL);
	opened = watch(path, IN_OPEN);
	close(slave);
	check(dup3(master, in->to, O_CLOEXEC), "carry", "the terminal");
	check(dup3(master, out->from, O_CLOEXEC), "carry", "the terminal");
	close(master);
	terminal = 1;
	set_window_size();
}

/* Closes the output streams that nobody reads on the host any more: the process gets SIGPIPE. */
static void close_unread(void)
{
	char reply[XS_REPLY_MAX];

	if (ask("unread", reply) < 0)
		return;
	hung_up = terminal;
	for (int i = 1; i < 3; i++)
		if (strchr(reply, '0' + i))
			close_end(&streams[i].from);
}

/* sent: whether all of it must be in the console's ring, and nothing be left in the kernel. */
static int has_ended(const struct stream *s, int sent)
{
	int left;

	return s->from < 0 && !is_pending(s) && (!sent || ioctl(s->to, TIOCOUTQ, &left) < 0 || !left);
}

/* The numbers of the streams that have ended while the process lives. */
static void list_ended(char text[4], int sent)
{
	join(text, 4, in->to < 0 && !at_end ? "0" : "", has_ended(out, sent) ? "1" : "",
	     has_ended(err, sent) ? "2" : "", NULL);
}

/*
 * Tells the host which these are; what was written before is in the rings then, and one that nobody reads holds back no
 * other.  One that has just ended may be the process's end, of which the host hears anyway.  Returns for how many
 * milliseconds to wait before the next call, or -1.
 */
static int tell_ended(void)
{
	static char told[4];
	static int64_t since;	/* when a stream ended of which the host has not been told; 0: none */
	char ended[4], sent[4];

	list_ended(ended, 0);
	if (terminal || !strcmp(ended, told))
		return -1;
	since = since ? since : milliseconds();
	if (milliseconds() - since < EOF_DELAY)
		return EOF_DELAY;
	list_ended(sent, 1);
	if (strcmp(sent, told))
		tell("ended", strcpy(told, sent));
	if (strcmp(sent, ended))
		return EOF_DELAY;
	since = 0;
	return -1;
}

/*
 * A process that was executed beside the container's own stays a zombie until what it has left behind is heard: its pid
 * is of nobody else meanwhile.  Returns whether it has ended.
 */
static int is_over(pid_t pid, int *status)
{
	siginfo_t ended = { 0 };

	if (waitid(P_PID, pid, &ended, WEXITED | WNOHANG | WNOWAIT) == 0 && !ended.si_pid)
		return 0;
	*status = ended.si_code == CLD_EXITED ? ended.si_status : 128 + ended.si_status;
	return 1;
}

/* The container ends with its process, so all others are killed then.  Returns whether any is left. */
static int reap(pid_t pid, int *status)
{
	pid_t child;
	int wait_status;

	while ((child = waitpid(-1, &wait_status, WNOHANG)) > 0) {
		if (child != pid)
			continue;
		*status = WIFSIGNALED(wait_status) ? 128 + WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
		forget_process(0);
		if (is_there("/run/dhcp"))
			set_up("release");
		kill(-1, SIGKILL);
	}
	return child == 0 || errno != ECHILD;
}

/* SIGWINCH: the host asks for a look.  SIGCHLD: see reap(). */
static int handle_signal(int signals, pid_t pid, int *status)
{
	struct signalfd_siginfo info;

	if (read(signals, &info, sizeof info) < 0 || info.ssi_signo != SIGWINCH)
		return process_number ? !is_over(pid, status) : reap(pid, status);
	set_window_size();
	close_unread();
	return 1;
}

/* What is in the output streams now is still carried, and no more: see close_left(). */
static void find_left(void)
{
	for (int i = 1; i < 3; i++)
		if (terminal)
			streams[i].left = TERMINAL_MAX;
		else if (ioctl(streams[i].from, FIONREAD, &streams[i].left) < 0)
			streams[i].left = 0;
}

/*
 * A process that was executed beside the container's own has ended.  What it has left running, such as the tee of a
 * pipeline, may hold its pipes and write for ever: it is heard for as long as engines listen to it under runc.  Returns
 * for how many milliseconds to wait before the next call, or -1.
 */
static int close_left(void)
{
	static int64_t end;	/* when nobody listens any more; 0: not known, -1: that was before */

	if (end >= 0) {
		int64_t now = milliseconds();
		end = end ? end : now + (terminal ? 0 : LEFT_WAIT);
		if (now < end && !is_withdrawn())
			return end - now;
		end = -1;
		find_left();
	}
	for (int i = 1; i < 3; i++) {
		struct pollfd from = { streams[i].from, POLLIN, 0 };
		if (streams[i].left <= 0 || (!is_pending(&streams[i]) && poll(&from, 1, 0) == 0))
			close_end(&streams[i].from);
	}
	return -1;
}

/* A terminal that nothing has open is not waited for, for poll(2) would not wait: that it is opened is. */
static void set_events(struct pollfd fds[5], int signals)
{
	for (int i = 0; i < 3; i++)
		fds[i] = is_pending(&streams[i]) ? (struct pollfd){ streams[i].to, POLLOUT, 0 } :
						   (struct pollfd){ streams[i].from, POLLIN, 0 };
	fds[3] = (struct pollfd){ running ? signals : -1, POLLIN, 0 };
	fds[4] = (struct pollfd){ deserted ? opened : -1, POLLIN, 0 };
	if (deserted && is_pending(in))
		fds[0].fd = -1;
	if (deserted && !is_pending(out))
		fds[1].fd = -1;
}

/* Of events that are the same the kernel keeps one. */
static void take_opened(void)
{
	struct inotify_event event;

	if (read(opened, &event, sizeof event) > 0)
		deserted = 0;
}

/*
 * Carries until all processes and the output have ended; returns the exit status of the process.  That of an exec is
 * killed when the host takes the consoles away, for nobody is there for it any more, and what it has left is not heard.
 */
int carry(pid_t pid, int signals)
{
	int status = 0, mortal = process_number != 0, delay = -1;

	running = 1;
	check(fcntl(in->to, F_SETFL, O_NONBLOCK), "set", "the standard input");
	while (running || out->from >= 0 || err->from >= 0 || is_pending(out) || is_pending(err)) {
		struct pollfd fds[6] = { [5] = { mortal ? out->to : -1, 0, 0 } };

		set_events(fds, signals);
		if (poll(fds, COUNT(fds), running ? tell_ended() : delay) < 0)
			continue;
		if (fds[4].revents)
			take_opened();
		if (fds[3].revents && !(running = handle_signal(signals, pid, &status)))
			deserted = 0;	/* or for good */
		for (int i = 0; i < 3; i++) {
			if (fds[i].revents && is_pending(&streams[i])) {
				flush(&streams[i]);
			} else if (fds[i].revents) {
				fill(&streams[i]);
				streams[i].left -= running ? 0 : streams[i].end;
				at_end = i == 0 ? decode(in) : at_end;
			}
		}
		if (hung_up || ((at_end || in->from < 0) && !is_pending(in))) {
			close_stream(in);
			if (terminal)	/* its end is a hang-up */
				close_end(&out->from);
		}
		if (mortal && (fds[5].revents || out->to < 0)) {
			mortal = 0;
			kill(pid, SIGKILL);
		}
		if (!running && process_number)
			delay = close_left();
	}
	tcdrain(out->to);
	tcdrain(err->to);
	waitpid(pid, NULL, WNOHANG);	/* see is_over() */
	return status;
}

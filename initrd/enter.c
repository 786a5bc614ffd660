/*
 * enter: starts the container's process in the VM and carries its standard streams.
 * xs:    the same program under a second name, one xenstore request from the shell.
 *
 * Both are part of init and do what busybox cannot: exact argv and environment, mounts that cannot
 * leave the rootfs, credentials, binary-safe streams.  All policy is in runx.py, which writes
 * /container/config: NUL-terminated strings, each keyword followed by its operands (see apply()).
 * Nothing here decides anything about the host: the other end of the consoles checks what it reads.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define CONFIG "/container/config"
#define SHARE "/mnt"	/* what dom0 exports: rootfs, and mounts/N for the bind mounts */

/* The container's own exit status when its process cannot be started: that of a shell. */
enum { CANNOT_EXECUTE = 126, NOT_FOUND = 127 };

static void die(int status, const char *operation, const char *object)
{
	dprintf(2, "%s %s: %s\n", operation, object, strerror(errno));
	_exit(status);
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

/* xs read PATH | write PATH VALUE | rm PATH | ls PATH.  Exit status 1 where xenstore refuses. */
static int xs_main(int argc, char **argv)
{
	char reply[XS_PAYLOAD_MAX + 1];
	const char *verb = argc > 2 ? argv[1] : "";
	uint32_t type = !strcmp(verb, "read") ? XS_READ : !strcmp(verb, "ls") ? XS_DIRECTORY :
			!strcmp(verb, "rm") ? XS_RM : !strcmp(verb, "write") ? XS_WRITE : 0;
	int len;

	if (!type || argc != (type == XS_WRITE ? 4 : 3)) {
		dprintf(2, "usage: xs read|ls|rm PATH, xs write PATH VALUE\n");
		return 2;
	}
	len = xs_request(type, argv[2], type == XS_WRITE ? argv[3] : NULL, reply);
	if (len < 0)
		return 1;
	if (type == XS_READ)
		puts(reply);
	if (type == XS_DIRECTORY)
		for (char *name = reply; name < reply + len; name += strlen(name) + 1)
			puts(name);
	return 0;
}

/* ---- the container's process ---- */

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

static void load_config(void)
{
	struct stat st;
	int fd = open(CONFIG, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || fstat(fd, &st) < 0 || !(config_next = malloc(st.st_size + 1)) ||
	    read(fd, config_next, st.st_size) != st.st_size)
		die(CANNOT_EXECUTE, "read", CONFIG);
	close(fd);
	config_end = config_next + st.st_size;
	*config_end = 0;
}

/* mkdir -p, for the folders that mounts and cwd name and the image lacks. */
static void make_folders(char *path)
{
	for (char *slash = path; (slash = strchr(slash + 1, '/')); *slash = '/') {
		*slash = 0;
		mkdir(path, 0755);
	}
	mkdir(path, 0755);
}

/* Where a mount goes: a folder, or an empty file if it is a file that is bound there. */
static void make_target(char *path, const char *source, unsigned long flags)
{
	struct stat st;
	char *slash = strrchr(path, '/');

	if (!(flags & MS_BIND) || stat(source, &st) < 0 || S_ISDIR(st.st_mode)) {
		make_folders(path);
		return;
	}
	*slash = 0;
	make_folders(path);
	*slash = '/';
	close(open(path, O_CREAT | O_CLOEXEC, 0644));
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
	    mount(SHARE "/rootfs", SHARE "/rootfs", NULL, MS_BIND, NULL) < 0 || chdir(SHARE "/rootfs") < 0 ||
	    mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || fchdir(share) < 0)
		die(CANNOT_EXECUTE, "enter", "the rootfs");
}

/* Executes the records in order; the operands of each are named beside its keyword. */
static void apply_config(char **args, char **envs)
{
	gid_t *groups = NULL, gid = 0;
	size_t n_args = 0, n_envs = 0, n_groups = 0;
	uid_t uid = 0;
	mode_t mask = 022;
	char *cwd = "/";

	while (config_next < config_end) {
		char *keyword = next();

		if (!strcmp(keyword, "mount")) {	/* source target type flags data */
			char *source = next(), *target = next(), *type = next();
			unsigned long flags = next_number();
			char *data = next();
			make_target(target, source, flags);
			if (mount(source, target, type, flags, data) < 0)
				die(CANNOT_EXECUTE, "mount", target);
		} else if (!strcmp(keyword, "node")) {	/* path mode major minor */
			char *path = next();
			mode_t mode = next_number();
			unsigned long major = next_number(), minor = next_number();
			if (mknod(path, mode, makedev(major, minor)) < 0 && errno != EEXIST)
				die(CANNOT_EXECUTE, "mknod", path);
			chmod(path, mode & 07777);
		} else if (!strcmp(keyword, "link")) {	/* content path */
			char *content = next(), *path = next();
			if (symlink(content, path) < 0 && errno != EEXIST)
				die(CANNOT_EXECUTE, "symlink", path);
		} else if (!strcmp(keyword, "hostname")) {	/* name */
			char *name = next();
			if (sethostname(name, strlen(name)) < 0)
				die(CANNOT_EXECUTE, "sethostname", name);
		} else if (!strcmp(keyword, "user")) {	/* uid gid umask */
			uid = next_number();
			gid = next_number();
			mask = next_number();
		} else if (!strcmp(keyword, "group")) {	/* gid */
			groups = realloc(groups, (n_groups + 1) * sizeof *groups);
			groups[n_groups++] = next_number();
		} else if (!strcmp(keyword, "cwd")) {	/* path */
			cwd = next();
		} else if (!strcmp(keyword, "arg")) {	/* string */
			args[n_args++] = next();
		} else if (!strcmp(keyword, "env")) {	/* NAME=value */
			envs[n_envs++] = next();
		} else {
			errno = EPROTO;
			die(CANNOT_EXECUTE, "apply", keyword);
		}
	}
	make_folders(strdup(cwd));
	umask(mask);
	for (int fd = 0; fd <= 2; fd++)	/* so that the user may open /dev/stdout again, as under runc */
		if (fchown(fd, uid, -1) < 0)
			die(CANNOT_EXECUTE, "chown", "a standard stream");
	if (setgroups(n_groups, groups) < 0 || setgid(gid) < 0 || setuid(uid) < 0)
		die(CANNOT_EXECUTE, "set", "the user and group ids");
	if (chdir(cwd) < 0)
		die(CANNOT_EXECUTE, "chdir", cwd);
}

static void run_process(void)
{
	size_t most = config_end - config_next;
	char **args = calloc(most + 1, sizeof *args), **envs = calloc(most + 1, sizeof *envs);

	enter_rootfs();
	apply_config(args, envs);
	clearenv();
	environ = envs;
	execvp(args[0], args);
	die(errno == ENOENT ? NOT_FOUND : CANNOT_EXECUTE, "exec", args[0]);
}

/* ---- streams: pipes for the process, consoles towards the host ---- */

/*
 * A console is a tty and knows no end of file, so the process gets pipes and this loop carries
 * them.  hvc1: standard input and output, hvc2: standard error.  In the input the host escapes
 * with DLE: DLE DLE is that byte, DLE EOT the end.  What is behind back-pressures to what is before.
 */
enum { DLE = 0x10, EOT = 0x04 };

struct stream {
	int from, to;		/* -1: closed */
	size_t start, end;	/* what of buffer is still to be written */
	char buffer[4096];
};

static void fill(struct stream *s)
{
	ssize_t n = read(s->from, s->buffer, sizeof s->buffer);

	s->start = 0;
	s->end = n > 0 ? n : 0;
	if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
		close(s->from);
		s->from = -1;
	}
}

static void flush(struct stream *s)
{
	ssize_t n = write(s->to, s->buffer + s->start, s->end - s->start);

	if (n > 0)
		s->start += n;
	else if (n < 0 && errno != EAGAIN && errno != EINTR)
		s->start = s->end;	/* nobody reads it any more */
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

/* The container ends with its process, so all others are killed then.  Returns 1 when none is left. */
static int reap(pid_t process, int *status)
{
	pid_t pid;
	int wait_status;

	while ((pid = waitpid(-1, &wait_status, WNOHANG)) > 0)
		if (pid == process) {
			*status = WIFSIGNALED(wait_status) ? 128 + WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
			kill(-1, SIGKILL);
		}
	return pid < 0 && errno == ECHILD;
}

static int carry(pid_t process, int signals, struct stream *in, struct stream *out, struct stream *err)
{
	int status = 0, running = 1, at_end = 0;

	while (running || out->from >= 0 || err->from >= 0 || out->start < out->end || err->start < err->end) {
		int in_pending = in->start < in->end, out_pending = out->start < out->end, err_pending = err->start < err->end;
		struct pollfd fds[] = {
			{ running ? signals : -1, POLLIN, 0 },
			{ in->to >= 0 && !in_pending ? in->from : -1, POLLIN, 0 },
			{ in_pending ? in->to : -1, POLLOUT, 0 },
			{ out_pending ? out->to : out->from, out_pending ? POLLOUT : POLLIN, 0 },
			{ err_pending ? err->to : err->from, err_pending ? POLLOUT : POLLIN, 0 },
		};

		if (poll(fds, sizeof fds / sizeof *fds, -1) < 0)
			continue;
		if (fds[0].revents) {
			struct signalfd_siginfo ignored;
			if (read(signals, &ignored, sizeof ignored) > 0 && reap(process, &status))
				running = 0;
		}
		if (fds[1].revents) {
			fill(in);
			at_end = decode(in);
		}
		if (fds[2].revents)
			flush(in);
		if (at_end && in->start >= in->end && in->to >= 0) {
			close(in->to);
			in->to = -1;
		}
		if (fds[3].revents)
			out_pending ? flush(out) : fill(out);
		if (fds[4].revents)
			err_pending ? flush(err) : fill(err);
	}
	return status;
}

static void announce(pid_t process)
{
	char reply[XS_PAYLOAD_MAX + 1];
	FILE *file = fopen("/run/pid", "w");

	if (!file || fprintf(file, "%d\n", process) < 0 || fclose(file) < 0)
		die(CANNOT_EXECUTE, "write", "/run/pid");
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
	int stdin_pipe[2], stdout_pipe[2], stderr_pipe[2], hvc1, hvc2, signals, status;
	sigset_t chld, before;
	pid_t process;

	hvc1 = open_console("/dev/hvc1");
	hvc2 = open_console("/dev/hvc2");
	load_config();
	sigemptyset(&chld);
	sigaddset(&chld, SIGCHLD);
	sigprocmask(SIG_BLOCK, &chld, &before);
	prctl(PR_SET_CHILD_SUBREAPER, 1);	/* whoever loses its parent becomes ours to wait for */
	signals = signalfd(-1, &chld, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signals < 0 || pipe2(stdin_pipe, O_CLOEXEC) < 0 || pipe2(stdout_pipe, O_CLOEXEC) < 0 ||
	    pipe2(stderr_pipe, O_CLOEXEC) < 0)
		die(CANNOT_EXECUTE, "make", "the standard streams");
	process = fork();
	if (process < 0)
		die(CANNOT_EXECUTE, "fork", "the container's process");
	if (process == 0) {
		setsid();
		sigprocmask(SIG_SETMASK, &before, NULL);
		dup2(stdin_pipe[0], 0);
		dup2(stdout_pipe[1], 1);
		dup2(stderr_pipe[1], 2);
		run_process();
	}
	close(stdin_pipe[0]);
	close(stdout_pipe[1]);
	close(stderr_pipe[1]);
	signal(SIGPIPE, SIG_IGN);
	fcntl(stdin_pipe[1], F_SETFL, O_NONBLOCK);
	in = (struct stream){ .from = hvc1, .to = stdin_pipe[1] };
	out = (struct stream){ .from = stdout_pipe[0], .to = hvc1 };
	err = (struct stream){ .from = stderr_pipe[0], .to = hvc2 };
	announce(process);
	status = carry(process, signals, &in, &out, &err);
	tcdrain(hvc1);
	tcdrain(hvc2);
	return status;
}

int main(int argc, char **argv)
{
	char *name = strrchr(argv[0], '/');

	return strcmp(name ? name + 1 : argv[0], "xs") ? enter_main() : xs_main(argc, argv);
}

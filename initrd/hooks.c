/* SPDX-License-Identifier: Apache-2.0 */
/* startContainer hooks: in the container, as its user, before its process. */
#include "container.h"
#include <poll.h>
#include <sys/wait.h>

struct hook {
	struct hook *next;
	unsigned long timeout;	/* seconds, 0: none */
	char *path, **args, **env;	/* no env: the process's */
};

static struct hook *hooks, **hooks_end = &hooks;
int hook_state = -1;

enum { HOOK_LOOK = 10 };	/* milliseconds between looks whether a hook has ended */

static void apply_hook(char **word)
{
	struct hook *hook = *hooks_end = allocate(1, sizeof *hook);

	hooks_end = &hook->next;
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
	close(parent);
	parent = -1;	/* what goes wrong from here is the hook's output */
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
	len = join(message, sizeof message, "error running startContainer hook #", decimal(index), ": ", reason,
		   decimal(value), unit, ", stdout: ", outputs[0].text, ", stderr: ", outputs[1].text, NULL);
	for (size_t i = 0; i < len; i++)	/* it may go to a terminal */
		if ((unsigned char)message[i] < ' ' || message[i] == 127)
			message[i] = ' ';
	die_with(1, message);
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

void run_hooks(const sigset_t *before)
{
	size_t index = 0;

	for (struct hook *hook = hooks; hook; hook = hook->next)
		run_hook(hook, index++, before);
}

const struct keyword hook_keywords[] = {
	{ "hook", 2, apply_hook, EARLY },			/* path timeout n args... n env... */
	{ "state", 1, apply_state, LATE },			/* json, for hooks */
	{ NULL, 0, NULL, LATE }
};

# SPDX-License-Identifier: Apache-2.0
"""The guest's init: it builds with any libc, and its parts that need no VM do what they say, in a root folder that the
test makes."""

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sysconfig
import threading

import pytest
from conftest import REPOSITORY

INITRD = REPOSITORY / "initrd"
PARTS = sorted(path.name for path in INITRD.glob("*.c"))
WARNINGS = (
    "-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes", "-Wmissing-prototypes", "-Wwrite-strings", "-Wcast-qual",
    "-Wpointer-arith", "-Wvla", "-Wundef", "-Werror",
)  # fmt: skip
COMPILERS = {
    "x86_64, musl": "musl-gcc",
    "x86_64, glibc": "x86_64-linux-gnu-gcc",
    "arm64, glibc": "aarch64-linux-gnu-gcc",
    "arm, glibc": "arm-linux-gnueabihf-gcc",
}


@pytest.mark.parametrize("target", COMPILERS)
def test_init_compiles_without_a_warning(target, tmp_path):
    compiler = COMPILERS[target]
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler} here")
    headers = []
    if compiler == "musl-gcc":  # it has none of the kernel's; see initrd/build.sh
        for path in ("linux", "asm-generic", f"{sysconfig.get_config_var('MULTIARCH')}/asm"):
            (tmp_path / path.rpartition("/")[2]).symlink_to(f"/usr/include/{path}")
        headers = ["-idirafter", tmp_path]
    # fortified, glibc wants more results to be looked at
    options = ["-Os", "-D_FORTIFY_SOURCE=2", *WARNINGS, "-static", *headers, "-o", tmp_path / "init"]
    command = [compiler, *options, *(INITRD / part for part in PARTS)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize(
    "target, header, number",
    [("x86_64, glibc", "unistd.h", 59), ("x86_64, glibc", "unistd_32.h", 11), ("arm64, glibc", "unistd.h", 221),
     ("arm, glibc", "unistd.h", 11)],
)  # fmt: skip
def test_the_ramdisk_lists_the_system_calls_of_its_architecture(target, header, number, tmp_path):
    compiler = COMPILERS[target]
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler} here")
    function = re.search(r"^syscalls\(\) \{.*?^\}\n", (INITRD / "build.sh").read_text(), re.M | re.S).group()
    script = f"set -eu\ncompiler={compiler} work={tmp_path}\n{function}syscalls {header} -"
    result = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) > 250 and all(re.fullmatch(r"-[a-z0-9_]+ [0-9]+", line) for line in lines)
    assert f"-execve {number}" in lines


def test_one_function_allocates_and_it_checks():
    text = "".join((INITRD / part).read_text() for part in (*PARTS, "init.h"))
    calls = re.findall(r"\b(?:[mc]alloc|realloc\w*|str\w*dup\w*|v?asprintf|getline|getdelim|scandir)\b *\(", text)
    assert calls == ["calloc("]
    assert re.search(r"= calloc\(count, size\);\n\n\tif \(!memory\)\n\t\tdie\(", text)


# ---- parts of init as programs of their own


@pytest.fixture(scope="session")
def compile_part(tmp_path_factory):
    """Makes a program of a part, with a main() of the test's."""
    if not shutil.which("gcc"):
        pytest.skip("there is no gcc here")
    folder, gcc = tmp_path_factory.mktemp("init"), ["gcc", "-O1", "-Dmain=main_of_init", "-I", INITRD]
    subprocess.run([*gcc, "-c", *(INITRD / part for part in PARTS)], cwd=folder, check=True)

    def compile_part(part, main):
        program, source = folder / part.replace(".c", ""), folder / f"test_{part}"
        source.write_text(f'#include "{part}"\n#undef main\n{main}')
        others = [folder / other.replace(".c", ".o") for other in PARTS if other != part]
        subprocess.run([*gcc, "-static", "-o", program, source, *others], check=True)
        return program

    return compile_part


def run_in(root, program, *words):
    """Runs a static program whose "/" is root."""
    if os.geteuid() != 0:
        pytest.skip("only root can change its root folder")
    shutil.copy(program, root / "program")
    return subprocess.run(["chroot", root, "/program", *words], capture_output=True, text=True)


FILES_MAIN = r"""
#include <stdio.h>

int main(int argc, char **argv)
{
	char **word = argv + 2;
	int missing;

	(void)argc;
	if (!strcmp(argv[1], "resolve")) {
		char *found = resolve(word[0], &missing);
		printf("%s %d", found, missing);
	} else if (!strcmp(argv[1], "make")) {
		return make(word[0], S_IFREG | 0600, 0) < 0 ? errno : 0;
	} else if (!strcmp(argv[1], "terminal")) {
		struct termios mode;
		int sockets[2];
		socketpair(AF_UNIX, SOCK_STREAM, 0, sockets);
		parent = sockets[0];
		process_number = 1;
		if (write(sockets[1], "", 1) != 1 || fork() || setsid() < 0)	/* as the supervisor answers */
			return wait(&missing) < 0 || missing;
		(*word ? apply_plain_terminal : apply_terminal)(word);
		return tcgetattr(2, &mode) || !!(mode.c_oflag & ONLCR) == !!*word;
	} else {
		apply_mask(word);
	}
	return 0;
}
"""

PROCESS_MAIN = r"""
#include <stdio.h>

int main(int argc, char **argv)
{
	char **word = argv + 2;

	make_settings(argc);
	if (!strcmp(argv[1], "home")) {
		settings.uid = number(word[0]);
		while (*++word)
			apply_env(word);
		set_home();
		for (char **variable = settings.env; *variable; variable++)
			printf("%s\n", *variable);
	} else if (!strcmp(argv[1], "cwd")) {
		settings.cwd = word[0];
		enter_cwd();
	} else if (!strcmp(argv[1], "execute")) {
		sigset_t none;
		sigemptyset(&none);
		setenv("PATH", word[0], 1);
		settings.args = word + 1;
		execute(&none);
	} else if (!strcmp(argv[1], "show")) {
		puts(word[0]);
	} else {
		init_root = open("/", O_PATH);
		next_word = word[2];
		words_end = argv[argc - 1] + strlen(argv[argc - 1]);
		apply_seccomp(word);
		for (int i = 0; i < settings.filter.len; i++)
			printf("%u ", settings.filter.filter[i].k);
	}
	return 0;
}
"""


@pytest.fixture(scope="session")
def files(compile_part):
    return compile_part("files.c", FILES_MAIN)


@pytest.fixture(scope="session")
def process(compile_part):
    return compile_part("process.c", PROCESS_MAIN)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "etc").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "link, path, found",
    [
        ("x", "/", "/ 0"),
        ("x", "/folder/./../folder//", "/folder 0"),
        ("x", "/no/such", "/no/such 1"),
        ("x", "/no/../folder", "/folder 0"),
        ("x", "/file", "/file 0"),
        ("folder", "/link", "/folder 0"),
        ("folder/../folder", "/folder/../link/in", "/folder/in 1"),
        ("/no/such", "/link/in", "/no/such/in 1"),
        ("../../../../etc", "/link", "/etc 0"),
        ("../../../../out", "/link/../../..", "/ 0"),
        ("../../../../out", "/link", "/out 1"),
    ],
)
def test_a_path_leads_to_names_that_are_no_links_and_below_the_root(files, root, link, path, found):
    (root / "link").symlink_to(link)
    assert run_in(root, files, "resolve", path).stdout == found


@pytest.mark.parametrize(
    "link, path, reason",
    [("link", "/link", "Too many levels of symbolic links"), ("a/" * 2000, "/link/" + "b/" * 99, "File name too long")],
)
def test_a_path_without_an_end_is_refused(files, root, link, path, reason):
    (root / "link").symlink_to(link)
    result = run_in(root, files, "resolve", path)
    assert (result.returncode, result.stderr) == (126, f"follow {path}: {reason}\n")


@pytest.mark.parametrize(
    "path, result", [("/folder/new", 0), ("/no/such/new", 0), ("/file", errno.EEXIST), ("/file/new", errno.ENOTDIR)]
)
def test_what_is_made_comes_with_the_folders_above_it(files, root, path, result):
    assert run_in(root, files, "make", path).returncode == result
    assert result or (root / path[1:]).is_file()


def test_what_is_to_be_masked_may_be_missing_but_not_unknown(files, root):
    assert run_in(root, files, "mask", "/no/such").returncode == 0
    result = run_in(root, files, "mask", "/file/below")
    assert (result.returncode, result.stderr) == (126, "mask /file/below: Not a directory\n")


@pytest.mark.parametrize("words", [["plain"], []])
def test_a_terminal_that_leads_to_a_pipe_adds_no_carriage_returns(files, words):
    assert subprocess.run([files, "terminal", *words]).returncode == 0


PASSWD = "root:x:0:0::/root:/bin/sh:more\nshort:x:7:7:\nuser:x:7:7::/home/user\nother:x:7:7::/x:\nno:x:8:8:::\n"


@pytest.mark.parametrize(
    "words, environment",
    [
        (["7"], ["HOME=/home/user"]),
        (["0", "A=b"], ["A=b", "HOME=/root"]),
        (["7", "HOME=", "A=b"], ["HOME=/home/user", "A=b"]),
        (["7", "HOME=/mine", "A=b"], ["HOME=/mine", "A=b"]),
        (["8"], ["HOME=/"]),
        (["9"], ["HOME=/"]),
    ],
)
def test_home_is_that_of_the_images_passwd_unless_it_is_set(process, root, words, environment):
    (root / "etc/passwd").write_text(PASSWD)
    assert run_in(root, process, "home", *words).stdout.splitlines() == environment


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "endless"])
def test_home_is_the_root_folder_where_the_image_has_no_passwd_to_be_read(process, root, kind):
    path = root / "etc/passwd"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "endless":  # a hole, of more than there is memory
        path.touch()
        os.truncate(path, 2**42)
    assert run_in(root, process, "home", "7").stdout == "HOME=/\n"


def test_a_seccomp_filter_gets_numbers_for_names(process, root):
    (root / "etc/syscalls").write_text("-exit 1\n-read 3\nclose 3\nread 0\nwrite 1\n")
    names = ["read", "write", "-read", "-exit", "unknown", "close", "7", "max", "-max"]
    instructions = [word for name in names for word in ("1", "2", "3", name)]
    result = run_in(root, process, "seccomp", "0", str(len(names)), *instructions)
    assert result.stdout.split() == ["0", "1", "3", "1", str(2**32 - 1), "3", "7", "3", "3"]


@pytest.mark.parametrize(
    "name, status, reason",
    [
        ("nowhere", 127, "executable file not found in $PATH"),
        ("plain", 127, "executable file not found in $PATH"),
        ("loop", 127, "executable file not found in $PATH"),
        ("x" * 300, 127, "executable file not found in $PATH"),
        ("broken", 126, "exec format error"),
        ("script", 127, "no such file or directory"),  # that is to interpret it, also where there is another one
        ("/no/such", 127, "stat /no/such: no such file or directory"),
        ("/file/below", 126, "stat /file/below: not a directory"),
        ("/folder", 126, "permission denied"),
        ("folder/plain", 126, "permission denied"),
        ("/folder/broken", 126, "exec format error"),
        ("/folder/script", 127, "no such file or directory"),  # that is to interpret it
    ],
)
def test_what_cannot_be_executed_is_told_in_runcs_words(process, root, name, status, reason):
    for file, content, mode in (("plain", "", 0o644), ("broken", "?", 0o755), ("script", "#!/no/such", 0o755)):
        path = root / "folder" / file
        path.write_text(content)
        path.chmod(mode)
    (root / "etc/script").write_text("#!/program show")
    (root / "etc/script").chmod(0o755)
    (root / "folder/loop").symlink_to("loop")
    result = run_in(root, process, "execute", "/no/such:/folder/:/file:/etc", name)
    assert (result.returncode, result.stderr) == (status, f'exec: "{name}": {reason}\n')


@pytest.mark.parametrize(
    "path, reason",
    [
        ("", "executable file not found in $PATH"),
        ("/folder::/etc", "cannot run executable found relative to current directory"),
        ("none:.", "cannot run executable found relative to current directory"),
        ("folder:none", "executable file not found in $PATH"),
    ],
)
def test_no_program_is_looked_for_in_the_working_directory(process, root, path, reason):
    for file in ("one", "etc/one"):
        (root / file).write_text("#!/program show")
        (root / file).chmod(0o755)
    assert run_in(root, process, "execute", path, "one").stderr == f'exec: "one": {reason}\n'


@pytest.mark.parametrize("name, path", [("one", "/folder/one"), ("two", "/etc/two"), ("/etc/two", "/etc/two")])
def test_a_program_is_told_where_in_path_it_is(process, root, name, path):
    for file, mode in (("folder/one", 0o755), ("folder/two", 0o644), ("etc/one", 0o755), ("etc/two", 0o755)):
        (root / file).write_text("#!/program show")
        (root / file).chmod(mode)
    assert run_in(root, process, "execute", "/no/such:/folder/:/etc", name).stdout == f"{path}\n"


def test_a_working_directory_that_cannot_be_entered_is_told_in_runcs_words(process, root):
    result = run_in(root, process, "cwd", "/no/such")
    words = 'chdir to cwd ("/no/such") set in config.json failed: no such file or directory\n'
    assert (result.returncode, result.stderr) == (126, words)


def test_a_working_directory_outside_of_the_rootfs_is_refused(process, root):
    """As a link of /proc leads to what init has open: here it stays where it was."""
    run_in(root, process, "cwd", "/")
    words = 'chdir to cwd (".") set in config.json failed: it is outside of the container\n'
    options = {"capture_output": True, "text": True, "preexec_fn": lambda: os.chroot(root)}
    result = subprocess.run(["/program", "cwd", "."], cwd="/", check=False, **options)
    assert (result.returncode, result.stderr) == (126, words)
    assert subprocess.run(["/program", "cwd", "."], cwd=root / "etc", check=False, **options).returncode == 0


CONTAINER_MAIN = r"""
#include <stdio.h>
#include <sys/socket.h>
#include <sys/wait.h>

int main(int argc, char **argv)
{
	char message[MESSAGE_MAX] = "";
	int sockets[2], status;
	sigset_t none;

	if (!strcmp(argv[1], "show"))
		return puts(getenv("HOME")) < 0;
	sigemptyset(&none);
	socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets);
	if (fork() == 0) {
		parent = sockets[1];
		take_words(argv[1], argv[argc - 1] + strlen(argv[argc - 1]) - argv[1]);
		run_process(&none);
	}
	close(sockets[1]);
	if (write(sockets[0], "", 1) == 1 && read(sockets[0], message, sizeof message - 1) > 0)
		fputs(message, stderr);
	return wait(&status) < 0 || status;
}
"""


@pytest.fixture(scope="session")
def container(compile_part):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("there are no mount namespaces for us")
    return compile_part("container.c", CONTAINER_MAIN)


def run_container(root, program, *words):
    """Runs the words of a process in a ramdisk that is root, whose rootfs has a proc."""
    (root / "mnt/rootfs/proc").mkdir(parents=True, exist_ok=True)
    for folder in ("proc", "run"):
        (root / folder).mkdir(exist_ok=True)
    shutil.copy(program, root / "init")
    shutil.copy(program, root / "mnt/rootfs/program")
    script = 'mount --bind "$1" "$1" && mount -t proc proc "$1/proc" && exec chroot "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", root, "/init", "0", "mount", "proc", "/proc", "proc"]
    return subprocess.run([*command, "0", "", *words], capture_output=True, text=True)


def test_a_process_is_made_of_its_words(container, root):
    result = run_container(root, container, "cwd", "/new/folder", "arg", "/program", "arg", "show")
    assert (result.returncode, result.stdout, result.stderr) == (0, "/\n", "")
    assert (root / "mnt/rootfs/new/folder").is_dir()


@pytest.mark.parametrize("place", ["arg", "env"])
def test_no_program_is_outside_of_the_rootfs(container, root, place):
    """Links of /proc lead to what init has open, and an image names its program."""
    for fd in range(3, 32):
        path = f"/proc/self/fd/{fd}"
        words = ["arg", f"{path}/init"] if place == "arg" else ["env", f"PATH={path}", "arg", "init"]
        result = run_container(root, container, *words, "arg", "show")
        assert (result.returncode != 0, result.stdout) == (True, ""), fd


def test_a_limit_of_open_files_is_for_the_process_and_not_for_init(container, root):
    (root / "mnt/rootfs/etc").mkdir(parents=True)
    (root / "mnt/rootfs/etc/passwd").write_text("x:x:7:7::/home/x:\n")
    words = ["user", "7", "7", "18", "arg", "/program", "arg", "show", "rlimit", "7", "6", "6"]
    result = run_container(root, container, *words)
    assert (result.returncode, result.stdout, result.stderr) == (0, "/home/x\n", "")


def test_nothing_is_mounted_over_the_rootfs_where_a_link_leads_to_it(container, root):
    (root / "mnt/rootfs/etc").mkdir(parents=True)
    (root / "mnt/rootfs/link").symlink_to("etc/..")
    result = run_container(
        root, container, "mount", "tmpfs", "/link", "tmpfs", "0", "", "arg", "/program", "arg", "show"
    )
    assert result.stderr == "mount over the rootfs at /link: Invalid argument"


def test_a_hook_that_cannot_be_executed_is_told_with_the_reason(container, root):
    words = ["state", "{}", "hook", "/no/such", "0", "1", "such", "0", "arg", "/program", "arg", "show"]
    result = run_container(root, container, *words)
    reason = "stdout: , stderr: exec /no/such: No such file or directory"
    assert result.stderr == f"error running startContainer hook #0: exit status 127, {reason}"


EXEC_MAIN = r"""
#include <stdio.h>

int main(int argc, char **argv)
{
	char lines[4096] = "\n";

	(void)argc;
	return puts(find_group(strcat(lines, argv[1]))) < 0;
}
"""


@pytest.mark.parametrize("before", ["", "10:name=openrc:/\n", "2:name=0:/0::/x\n1:name=x:/\n"])
def test_the_group_of_the_container_is_that_of_version_two(compile_part, before):
    program = compile_part("exec.c", EXEC_MAIN)
    result = subprocess.run([program, f"{before}0::/container/a b\n"], capture_output=True, text=True)
    assert result.stdout == "container/a b/cgroup.procs\n"


DOORBELL_MAIN = r"""
pid_t fork(void)	/* there is no memory for another process */
{
	errno = ENOMEM;
	return -1;
}

int main(int argc, char **argv)
{
	pid_t pid, supervisor;
	int noted = argc < 5 ? 0 : note_process(7, strtoul(argv[3], NULL, 10), strtoul(argv[4], NULL, 10));

	if (noted < 0 || (argc == 5 && (find_process(7, &pid, &supervisor) < 0 || supervisor != 222)))
		return 2;
	if (argc == 2)
		run(7);
	return argc == 2 ? 3 : is_early(argv[1], strtoul(argv[2], NULL, 10));
}
"""


@pytest.fixture(scope="session")
def doorbell(compile_part):
    return compile_part("doorbell.c", DOORBELL_MAIN)


@pytest.mark.parametrize(
    "words, stays",
    [
        (["kill", "7", "0", "222"], True),
        (["killall", "7", "0", "222"], True),
        (["look", "7", "0", "222"], True),
        (["kill", "7", "111", "222"], False),
        (["kill", "8", "0", "222"], False),  # there is no such process
        (["run", "7", "0", "222"], False),
        (["cpus", ""], False),
    ],
)
def test_what_is_asked_of_a_process_waits_until_it_is_executed(doorbell, root, words, stays):
    (root / "run/process").mkdir(parents=True)
    assert run_in(root, doorbell, *words).returncode == stays


def test_a_process_for_which_there_is_no_memory_ends_and_the_next_request_is_answered(doorbell, root):
    (root / "run/process").mkdir(parents=True)
    assert run_in(root, doorbell, "run").returncode == 3
    assert not any((root / "run/process").iterdir())


STREAMS_MAIN = r"""
static int carry_at_a_terminal(char **script)
{
	int slave, signals, master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
	sigset_t before;
	pid_t pid;

	process_number = 1;
	if (unlockpt(master) < 0 || (slave = open(ptsname(master), O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0)
		return 2;
	signals = catch_signals(&before);
	if ((pid = fork()) == 0) {
		sigprocmask(SIG_SETMASK, &before, NULL);
		for (int fd = 0; setsid() && fd <= 2; fd++)
			dup2(slave, fd);
		execvp(*script, script);
		_exit(127);
	}
	set_consoles(0, 1, -1);
	set_pipes(dup(slave), dup(slave), -1);
	set_terminal(master);
	close(slave);
	return carry(pid, signals);
}

int main(int argc, char **argv)
{
	struct stream *s = &streams[0];
	int ended = 0;

	if (argc > 2)
		return carry_at_a_terminal(argv + 2);
	s->from = 0;
	while (!ended && (s->end = read(0, s->buffer, strtoul(argv[1], NULL, 10)))) {
		ended = decode(s);
		if (write(1, s->buffer, s->end) < 0)
			return 2;
	}
	return ended;
}
"""


@pytest.fixture(scope="session")
def streams(compile_part):
    return compile_part("streams.c", STREAMS_MAIN)


@pytest.mark.parametrize("size", [1, 2, 3, 4096])
@pytest.mark.parametrize(
    "sent, received, ended",
    [
        (b"plain \x04 \x00\xff", b"plain \x04 \x00\xff", 0),
        (b"\x10\x10\x10\x10\x04x", b"\x10\x10\x04x", 0),
        (b"all\x10\x04", b"all", 1),
        (b"\x10\x10\x10\x04", b"\x10", 1),
        (b"\x10\x04", b"", 1),
        (bytes(range(16)) + b"\x10" + bytes(range(16, 256)) + b"\x10\x04", bytes(range(256)), 1),
    ],
)
def test_input_arrives_with_every_byte_however_it_is_cut(streams, sent, received, ended, size):
    result = subprocess.run([streams, str(size)], input=sent, capture_output=True)
    assert (result.stdout, result.returncode) == (received, ended)


# closes all that it has of its terminal, and once more
REOPENS = """
    tty=$(tty); stty -echo; echo begun
    for n in 1 2; do exec <&- >&- 2>&-; sleep 0.5; exec <$tty >$tty 2>&1; read -r line; echo $n $line; done
    exec <&- >&- 2>&-; sleep 0.5; exit 5
"""


def test_a_terminal_that_nothing_has_open_for_a_while_is_carried_again(streams):
    """What is typed meanwhile is for who opens it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([streams, "terminal", "sh", "-c", REOPENS], bufsize=0, **pipes) as process:
        assert process.stdout.read(7) == b"begun\r\n"
        process.stdin.write(b"typed\nagain\n")
        assert (process.stdout.read(), process.wait()) == (b"1 typed\r\n2 again\r\n", 5)


F_SETPIPE_SZ = 1031  # fcntl.F_SETPIPE_SZ since Python 3.10
PAGE = os.sysconf("SC_PAGESIZE")


def test_init_of_another_name_is_the_program_of_an_image_and_does_nothing(compile_part, root):
    """Else it would mount, and wait for a host that never answers; in a pid namespace it cannot end this machine."""
    named = compile_part(
        "init.c", "int main(int argc, char **argv)\n{\n\treturn main_of_init(argc - 1, argv + 1);\n}\n"
    )
    shutil.copy(named, root / "program")
    (root / "dev").mkdir()
    command = ["unshare", "--mount", "--pid", "--fork", "chroot", root, "/program", "/proc/self/exe"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr, os.listdir(root / "dev")) == (126, "", [])


@pytest.fixture(scope="session")
def memory(compile_part):
    return compile_part("init.c", "int main(void)\n{\n\treturn was_short_of_memory();\n}\n")


@pytest.mark.parametrize("count", [0, 3])
def test_a_process_that_was_killed_for_lack_of_memory_is_seen_in_several_reads(memory, root, count):
    """/proc gives a page at a time, as a pipe of one page does."""
    text = "".join(f"nr_something_{n} {n}\n" for n in range(500)) + f"oom_kill {count}\nlast 1\n"
    (root / "proc").mkdir()
    os.mkfifo(root / "proc/vmstat")

    def feed():
        fd = os.open(root / "proc/vmstat", os.O_WRONLY)
        fcntl.fcntl(fd, F_SETPIPE_SZ, PAGE)
        os.write(fd, text.encode())
        os.close(fd)

    writer = threading.Thread(target=feed)
    writer.start()
    assert len(text) > 2 * PAGE and run_in(root, memory).returncode == bool(count)
    writer.join()

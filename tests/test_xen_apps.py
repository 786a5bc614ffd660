# SPDX-License-Identifier: Apache-2.0
"""What Debian's packages ask of a file system, in one container with a whole Debian over 9p (see lab/debian.py)."""

import os
import pathlib
import select
import shlex
import subprocess
import time

import pytest
from conftest import DEVPTS, Bundle, call, config, difference, dom0_state, wait_until

DISK = "/dev/vdb"
TIME_LIMIT = 1200  # seconds, for one script: a busy machine needs that


class Debian:
    """A running container whose process is a shell that reads commands."""

    def __init__(self, bundle):
        self.output, theirs = os.pipe()
        self.process = subprocess.Popen(bundle.command("run"), stdin=subprocess.PIPE, stdout=theirs, stderr=theirs)
        os.close(theirs)

    def run(self, script):
        """Run a script, whose commands must all succeed; return what it prints."""
        end = "the script has ended with status"
        self.process.stdin.write(f"sh -euc {shlex.quote(script)} </dev/null 2>&1; echo {end} $?\n".encode())
        self.process.stdin.flush()
        deadline, seen = time.monotonic() + TIME_LIMIT, ""
        while end not in seen or not seen.endswith("\n"):
            assert select.select([self.output], [], [], max(0, deadline - time.monotonic()))[0], seen
            data = os.read(self.output, 65536)
            assert data, seen
            seen += data.decode(errors="replace")
        printed, _, status = seen.rpartition(end)
        assert status.strip() == "0", printed
        return printed

    def close(self):
        """End the shell and with it the container."""
        self.process.stdin.close()
        self.process.wait(60)
        os.close(self.output)


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    """One VM for all tests here; when it has ended, dom0 is as it was."""
    before, folder, root = dom0_state(), tmp_path_factory.mktemp("debian"), pathlib.Path("/mnt")
    assert call("mount", DISK, str(root)).returncode == 0, "the lab has no disk with a Debian"
    bundle = Bundle(folder)
    spec = config("/bin/sh", env=["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"])
    spec["root"] = {"path": str(root)}
    spec["annotations"] = {"org.runx.rootfs": "9p", "org.runx.memory": "512"}
    spec["mounts"] += [
        DEVPTS,
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["mode=1777"]},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmp", "options": ["mode=1777"]},
    ]
    bundle.write_config(spec)
    machine = Debian(bundle)
    try:
        yield machine
    finally:
        machine.close()
        bundle.runx("delete", "--force")
        assert call("umount", str(root)).returncode == 0
    wait_until(lambda: not difference(before), "dom0 as it was before these tests", 10)


# ---- packages

PACKAGE = """
    # NAME VERSION DEPENDS COUNT: make /srv/packages/NAME.deb of so many files
    package() {
        folder=/tmp/$1
        mkdir -p $folder/DEBIAN $folder/usr/share/$1/below $folder/etc
        printf "Package: $1\\nVersion: $2\\nArchitecture: all\\nMaintainer: x <x@y>\\nDescription: x\\n" \\
            >$folder/DEBIAN/control
        [ -z "$3" ] || echo "Depends: $3" >>$folder/DEBIAN/control
        echo /etc/$1.conf >$folder/DEBIAN/conffiles
        echo "setting of $2" >$folder/etc/$1.conf
        cd $folder/usr/share/$1
        for number in $(seq $(($4 - 3))); do echo "$number of $2" >below/$number; done
        chmod 4755 below/3
        ln below/1 hard
        ln -s below/2 soft
        dpkg-deb --root-owner-group -b $folder /srv/packages/$1.deb >/dev/null
        rm -r $folder
    }
    rm -rf /srv/packages
    mkdir /srv/packages
"""


def test_dpkg_installs_upgrades_and_removes_a_package(debian):
    script = """
        package lab 1 '' 50
        dpkg -i /srv/packages/lab.deb >/srv/log
        dpkg -V lab
        cd /usr/share/lab
        find . /etc/lab.conf -type f | wc -l
        stat -c '%a %U %h' below/3 hard
        cat soft /etc/lab.conf
        echo changed >>/etc/lab.conf
        package lab 2 '' 50
        dpkg --force-confold -i /srv/packages/lab.deb >>/srv/log 2>&1
        cd /usr/share/lab
        cat soft /etc/lab.conf /etc/lab.conf.dpkg-dist
        dpkg -r lab >>/srv/log
        ls -d /usr/share/lab 2>&1 || ls /etc/lab.conf
        dpkg -P lab >>/srv/log
        ls /etc/lab.conf 2>&1 || true
    """
    output = debian.run(PACKAGE + script)
    assert output.splitlines() == [
        "49", "4755 root 1", "644 root 2", "2 of 1", "setting of 1",
        "2 of 2", "setting of 1", "changed", "setting of 2",
        "ls: cannot access '/usr/share/lab': No such file or directory", "/etc/lab.conf",
        "ls: cannot access '/etc/lab.conf': No such file or directory",
    ]  # fmt: skip


def test_apt_installs_packages_of_a_folder_as_its_own_user(debian):
    """apt reads the folder as the user _apt, who may not write to it."""
    script = """
        package first 1 '' 10
        package second 1 first 10
        cd /srv/packages
        for name in first second; do
            dpkg-deb -f $name.deb
            echo "Filename: ./$name.deb"
            echo "Size: $(stat -c %s $name.deb)"
            echo "SHA256: $(sha256sum $name.deb | cut -d ' ' -f 1)"
            echo
        done >Packages
        echo 'deb [trusted=yes] file:/srv/packages ./' >/etc/apt/sources.list
        apt-get -q update 2>&1
        apt-get -qy install second 2>&1
        dpkg-query -W first second
        cat /usr/share/first/hard /usr/share/second/soft
        apt-get -qy purge first 2>&1
        ls -d /usr/share/first /usr/share/second 2>&1 || true
    """
    output = debian.run(PACKAGE + script)
    for words in (
        "The following additional packages will be installed:\n  first",
        "Setting up second (1) ...", "\nfirst\t1\nsecond\t1\n1 of 1\n2 of 1\n", "Purging configuration files for first",
        "cannot access '/usr/share/first'", "cannot access '/usr/share/second'",
    ):  # fmt: skip
        assert words in output, (words, output)
    assert "\nE: " not in output and "\nW: " not in output, output


def test_users_and_groups_are_made_and_removed(debian):
    output = debian.run("""
        groupadd -g 4321 crew
        useradd -m -u 4322 -g crew -G www-data -s /bin/sh sailor
        id sailor
        stat -c '%U %G' /home/sailor /home/sailor/.profile
        cd /home/sailor
        as() { setpriv --reuid sailor --regid crew --init-groups sh -c "$1"; }
        as 'echo mine >file'
        stat -c '%U %G' file
        as 'echo not >/etc/mine' 2>&1 || true
        stat -c '%a %U %G' /etc/shadow /etc/gshadow
        grep -c . /etc/passwd- >/dev/null
        usermod -l captain sailor
        getent passwd captain
        userdel -r captain 2>&1
        groupdel crew
        getent passwd captain || getent group crew || ls /home
        grpck -r
    """)
    assert output.splitlines() == [
        "uid=4322(sailor) gid=4321(crew) groups=4321(crew),33(www-data)",
        "sailor crew", "sailor crew", "sailor crew", "sh: 1: cannot create /etc/mine: Permission denied",
        "640 root shadow", "640 root shadow", "captain:x:4322:4321::/home/sailor:/bin/sh",
        "userdel: captain mail spool (/var/mail/captain) not found",
    ]  # fmt: skip


# ---- git


def test_git_keeps_clones_and_packs_a_repository(debian):
    output = debian.run("""
        rm -rf /srv/git
        mkdir /srv/git
        cd /srv/git
        export HOME=/srv/git
        git config --global user.name lab
        git config --global user.email lab@lab
        git init -q -b main one
        cd one
        for number in $(seq 10); do echo "line of $number" >$number; done
        mkdir below
        ln -s ../1 below/link
        chmod 755 2
        git add .
        git commit -qm first
        git mv 3 below/moved
        git rm -q 4
        echo more >>5
        git status --short
        git commit -qam second
        git checkout -qb side HEAD~
        echo side >6
        git commit -qam third
        git checkout -q main
        git merge -q -m merged side
        cd ..
        git clone -q one two
        git clone -q --no-hardlinks --bare one three
        cd two
        git log --oneline --no-decorate | wc -l
        cat 6 below/moved below/link
        git status --short
        git gc -q --aggressive --prune=now
        git count-objects
        git fsck --strict 2>&1
        echo pushed >7
        git commit -qam fourth
        git push -q ../three HEAD:main
        git -C ../three fsck --full
        git -C ../three show -s --format=%s main
        git -C ../one diff --stat
    """)
    assert output.splitlines() == [
        "D  4", " M 5", "R  3 -> below/moved", "4", "side", "line of 3", "line of 1", "0 objects, 0 kilobytes",
        "fourth",
    ]  # fmt: skip


# ---- databases


def test_two_writers_of_a_sqlite_database_lose_nothing(debian):
    output = debian.run("""
        rm -rf /srv/sqlite
        mkdir /srv/sqlite
        cd /srv/sqlite
        sqlite3 database 'PRAGMA journal_mode=WAL; CREATE TABLE t(writer, number);'
        write() {
            {
                echo ".timeout 300000"
                for number in $(seq 100); do
                    echo "BEGIN IMMEDIATE; INSERT INTO t VALUES($1, $number); COMMIT;"
                done
            } | sqlite3 -bail database
        }
        write 1 &
        first=$!
        write 2
        wait $first
        ls
        sqlite3 database 'PRAGMA integrity_check; SELECT writer, count(*), sum(number) FROM t GROUP BY writer;
            PRAGMA wal_checkpoint(TRUNCATE); PRAGMA journal_mode=DELETE; VACUUM; SELECT count(*) FROM t;'
        ls
    """)
    found = ["ok", "1|100|5050", "2|100|5050", "0|0|0", "delete", "200"]
    assert output.splitlines() == ["wal", "database", *found, "database"]


POSTGRES = """
    export PATH=/usr/lib/postgresql/15/bin:$PATH PGDATA=/srv/postgres/data PGHOST=/srv/postgres
    export PGUSER=postgres TZ=UTC  # for initdb, which would read all time zones
    as() { setpriv --reuid postgres --regid postgres --init-groups "$@"; }
    control() { as pg_ctl -w -t 300 -l log "$@" >words 2>&1 || { cat words log; exit 1; }; }
    query() { psql -qAtX -c "$1"; }
"""


def test_postgres_keeps_what_it_has_committed(debian):
    """Also when it is killed, and its log is all that has it."""
    script = """
        rm -rf /srv/postgres
        install -d -o postgres -g postgres /srv/postgres
        cd /srv/postgres
        as initdb -A trust --no-sync >words
        echo "listen_addresses = ''
            unix_socket_directories = '$PGHOST'
            max_connections = 10
            shared_buffers = 8MB
            recovery_init_sync_method = syncfs" >>$PGDATA/postgresql.conf
        control start
        query 'SHOW fsync'
        query 'CREATE TABLE t(a int PRIMARY KEY, b text)'
        for number in $(seq 100); do echo "INSERT INTO t VALUES($number, repeat('$number', 100));"; done | psql -qX
        control restart -m fast
        query 'SELECT count(*), sum(a), sum(length(b)) FROM t'
        query "UPDATE t SET b = 'changed' WHERE a <= 50"
        control stop -m immediate
        control start
        query "SELECT count(*) FROM t WHERE b = 'changed'"
        query 'VACUUM FULL t'
        query 'REINDEX TABLE t'
        query 'SELECT count(*), sum(a) FROM t'
        control stop
        as pg_controldata | sed -n 's/^Database cluster state: *//p'
    """
    output = debian.run(POSTGRES + script)
    assert output.splitlines() == ["on", "100|5050|19200", "50", "100|5050", "shut down"]


def test_redis_finds_its_dump_and_its_log_again(debian):
    output = debian.run("""
        rm -rf /srv/redis
        install -d -o redis -g redis /srv/redis
        cd /srv/redis
        start() {
            setpriv --reuid redis --regid redis --init-groups redis-server \\
                --port 0 --unixsocket /srv/redis/socket --dir /srv/redis --save '' \\
                --daemonize yes --pidfile /srv/redis/pid --logfile /srv/redis/log "$@" >/dev/null
            until [ "$(ask ping 2>&1)" = PONG ]; do sleep 0.2; done
        }
        ask() { redis-cli -s /srv/redis/socket "$@"; }
        end() {
            pid=$(cat pid)
            "$@"
            while kill -0 $pid 2>/dev/null; do sleep 0.2; done
        }
        start
        ask set kept value
        ask save
        ask set lost value
        end ask shutdown nosave
        start
        ask mget kept lost
        end ask shutdown nosave
        rm dump.rdb
        start --appendonly yes --appendfsync always
        for number in $(seq 100); do echo "incrby sum $number"; done | ask | tail -n 1
        end kill -9 $(cat pid)
        start --appendonly yes --appendfsync always
        ask get sum
        ask bgrewriteaof
        until ask info persistence | grep -q aof_rewrite_in_progress:0; do sleep 0.2; done
        ask incr sum
        end kill -9 $(cat pid)
        redis-check-aof appendonlydir/appendonly.aof.manifest | tail -n 1
        start --appendonly yes --appendfsync always
        ask get sum
        end ask shutdown nosave
    """)
    lines = [line for line in output.splitlines() if line]
    assert lines == [
        "OK", "OK", "OK", "value", "5050", "5050", "Background append only file rewriting started", "5051",
        "All AOF files and manifest are valid", "5051",
    ]  # fmt: skip


# ---- a server

NGINX = """
    get() {
        python3 -Ic '
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect("/srv/nginx/socket")
connection.sendall(b"GET %s HTTP/1.0\\r\\n\\r\\n" % sys.argv[1].encode())
answer = b"".join(iter(lambda: connection.recv(65536), b""))
head, _, body = answer.partition(b"\\r\\n\\r\\n")
print(head.split()[1].decode(), len(body), body[:20].split(b"\\n")[0].decode())
' "$1"
    }
"""


def test_nginx_serves_reloads_and_opens_a_new_log(debian):
    script = """
        rm -rf /srv/nginx
        mkdir -p /srv/nginx/site
        cd /srv/nginx
        echo first >site/page
        yes line | head -c 1000000 >site/large
        configure() {
            cat >new <<END
                user www-data;
                pid /srv/nginx/pid;
                error_log /srv/nginx/error.log notice;
                events {}
                http {
                    access_log /srv/nginx/access.log;
                    sendfile on;
                    server {
                        listen unix:/srv/nginx/socket;
                        root /srv/nginx/site;
                        add_header X-$1 yes;
                        location /$1 { return 200 $1; }
                    }
                }
END
            mv new nginx.conf
        }
        nginx() { /usr/sbin/nginx -p /srv/nginx -c /srv/nginx/nginx.conf "$@" 2>>/srv/nginx/words; }
        seen() { until grep -q "$1" "$2" 2>/dev/null; do sleep 0.1; done; }
        configure old
        nginx
        get /page
        get /large
        get /none
        get /old
        echo 'second, longer' >site/new
        mv site/new site/page
        get /page
        configure new
        nginx -s reload
        until [ "$(get /new)" = '200 3 new' ]; do sleep 0.1; done
        get /old
        mv access.log access.log.1
        nginx -s reopen
        until [ -s access.log ]; do get /after >/dev/null; done
        get /last
        cut -d '"' -f 2,3 access.log | tail -n 1
        grep -c 'GET /page' access.log.1
        grep -c last access.log.1 || true
        stat -c %U access.log
        nginx -s quit
        while [ -e pid ]; do sleep 0.1; done
        grep -c -e emerg -e alert -e crit error.log || true
    """
    output = debian.run(NGINX + script)
    assert output.splitlines() == [
        "200 6 first", "200 1000000 line", "404 153 <html>", "200 3 old", "200 15 second, longer", "404 153 <html>",
        "404 153 <html>", 'GET /last HTTP/1.0" 404 153 ', "2", "0", "www-data", "0",
    ]  # fmt: skip

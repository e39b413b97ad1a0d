"""kvt-bench ended by a signal: check_signals.py PROGRAM FOLDER [store] [redis]

Nothing is left of its files, nor is a server that it has started, and the signal is what ends it.
"""
import os
import shutil
import signal
import subprocess
import sys
import time


def fail(text):
    sys.exit("check_signals: " + text)


def servers_of(pid):
    """Children of the process, and whether they are Redis servers yet."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/stat" % name) as stat, open("/proc/%s/cmdline" % name) as line:
                parent = int(stat.read().rpartition(")")[2].split()[1])
                if parent == pid and "redis-server" in line.read():
                    found.append(int(name))
        except (OSError, IndexError):
            pass  # has ended meanwhile
    return found


def check(program, folder, number, command):
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    bench = subprocess.Popen([program, *command, "--dir", folder], stdout=subprocess.DEVNULL)
    servers, deadline = [], time.monotonic() + 120
    while not os.listdir(folder) and not servers:
        if bench.poll() is not None or time.monotonic() > deadline:
            bench.kill()
            fail("%s: no file and no server, code %s" % (command, bench.poll()))
        time.sleep(0.02)
        servers = servers_of(bench.pid) if "redis" in command else []
    bench.send_signal(number)
    code = bench.wait(120)
    if code != -number:
        fail("%s: %s: code %d" % (command, number.name, code))
    if os.listdir(folder):
        fail("%s: %s: left: %s" % (command, number.name, os.listdir(folder)))
    for server in servers:
        if os.path.exists("/proc/%d" % server):
            fail("%s: %s: its server runs on" % (command, number.name))


def main():
    program, folder, with_stores = sys.argv[1], os.path.join(sys.argv[2], "signals"), sys.argv[3:]
    commands = [["snapshot", "--part", "file", "--bytes", "64m"]]
    if "store" in with_stores:
        commands.append(["store", "--part", "directory", "--bytes", "256m"])
    if "redis" in with_stores and shutil.which("redis-server"):
        commands.append(["store", "--part", "redis", "--bytes", "64m"])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        for command in commands:
            check(program, folder, number, command)
    shutil.rmtree(folder)


main()

#!/usr/bin/env python3
"""What happens on the test disk between its backups, and how much of the disk that changes.

    days.py full|small DAY ROOT     the changes of DAY, made in the file system mounted at ROOT
    days.py compare OLD NEW         one line: what NEW has in use, and how much differs from OLD

All from fixed seeds, so that every machine gets the same days.
"""

import os
import random
import shutil
import sqlite3
import sys

CLUSTER = 64 << 10
BLOCK = 4 << 10
WORDS = ("order invoice shipped pending customer warehouse returned carton pallet express standard north south "
         "harbour station bridge mill market garden copper walnut linen cobalt amber slate").split()


def sentence(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def files_below(root, folder):
    found = []
    for at, folders, names in os.walk(os.path.join(root, folder)):
        folders.sort()
        found += [os.path.join(at, name) for name in sorted(names) if os.path.isfile(os.path.join(at, name))
                  and not os.path.islink(os.path.join(at, name))]
    return found


def change_files(root, rng):
    """An upgrade rewrites files with nearly the same content; clean-ups delete some; some configuration is edited."""
    shared = files_below(root, "usr/share")
    for path in rng.sample(shared, 400):
        with open(path, "rb") as file:
            data = file.read()
        os.unlink(path)
        write(path, data + b"\n# upgraded\n")
    for path in rng.sample(files_below(root, "usr/share/doc"), 250):
        os.unlink(path)
    shutil.rmtree(os.path.join(root, "usr/share/man/man3"), ignore_errors=True)
    for path in rng.sample(files_below(root, "etc"), 40):
        with open(path, "ab") as file:
            file.write(b"\n# edited by the administrator\n")
    with open(os.path.join(root, "etc/motd"), "w") as file:
        file.write("Day 1: welcome back.\n")


def add_files(root, rng):
    """Logs compress well, uploads not at all, source text in between; one library is copied, as a deployment would."""
    for name, lines in ("access.log", 200_000), ("app.log", 100_000):
        text = "".join(f"2026-11-24T{i // 3600 % 24:02}:{i // 60 % 60:02}:{i % 60:02} {rng.getrandbits(32):08x} "
                       f"{sentence(rng, 5)}\n" for i in range(lines))
        write(os.path.join(root, "var/log", name), text.encode())
    for i in range(12):
        write(os.path.join(root, f"srv/uploads/{i:02}.jpg"), rng.randbytes(2_000_000 + 200_000 * i))
    for i in range(300):
        write(os.path.join(root, f"home/dev/project/src/part{i:03}.c"), sentence(rng, 1200).encode())
    library = os.path.join(root, "usr/lib/python3")
    shutil.copytree(library, os.path.join(root, "srv/app/python3"), symlinks=True)


def make_database(root, rng):
    path = os.path.join(root, "srv/shop/shop.db")
    os.makedirs(os.path.dirname(path))
    database = sqlite3.connect(path)
    database.execute("PRAGMA page_size = 4096")
    database.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT, total REAL, token TEXT, note TEXT)")
    rows = ((i, f"customer{rng.randrange(40_000)}", rng.randrange(10**7) / 100, f"{rng.getrandbits(256):064x}",
             sentence(rng, 30)) for i in range(ROWS))
    database.executemany("INSERT INTO orders VALUES (?, ?, ?, ?, ?)", rows)
    database.execute("CREATE INDEX orders_customer ON orders (customer)")
    database.commit()
    database.close()


ROWS = 330_000
# Recent orders are what changes: updates fall on the last part of the table.
HOT_ROWS = 85_000


def update_database(root, rng):
    database = sqlite3.connect(os.path.join(root, "srv/shop/shop.db"))
    for _ in range(2000):
        database.execute("UPDATE orders SET total = ?, token = ? WHERE id = ?",
                         (rng.randrange(10**7) / 100, f"{rng.getrandbits(256):064x}",
                          ROWS - 1 - rng.randrange(HOT_ROWS)))
    database.commit()
    database.close()


def extents(file, length):
    """The parts of a sparse file that hold data, as whole clusters."""
    at = 0
    while at < length:
        try:
            start = os.lseek(file.fileno(), at, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        yield range(start // CLUSTER, -(-end // CLUSTER))
        at = end


def compare(old_path, new_path):
    with open(old_path, "rb") as old, open(new_path, "rb") as new:
        length = os.path.getsize(new_path)
        clusters = {c for file in (old, new) for part in extents(file, os.path.getsize(file.name)) for c in part}
        used = changed = blocks = 0
        for cluster in sorted(clusters):
            after = os.pread(new.fileno(), CLUSTER, cluster * CLUSTER)
            used += any(after)
            before = os.pread(old.fileno(), CLUSTER, cluster * CLUSTER).ljust(len(after), b"\0")
            if before != after:
                changed += 1
                blocks += sum(before[i:i + BLOCK] != after[i:i + BLOCK] for i in range(0, CLUSTER, BLOCK))
    print(f"{os.path.basename(new_path)}: {length >> 20} MiB disk, {used * CLUSTER / 1e6:.0f} MB in use; changed: "
          f"{changed * CLUSTER / 1e6:.0f} MB of 64 KiB clusters, {blocks * BLOCK / 1e6:.0f} MB of 4 KiB blocks")


def main():
    kind, *rest = sys.argv[1:]
    if kind == "compare":
        compare(*rest)
        return
    day, root = rest
    if kind == "small":
        write(os.path.join(root, "etc/motd"), b"Day 1: welcome back.\n")
    elif day == "day1":
        rng = random.Random(1)
        change_files(root, rng)
        add_files(root, rng)
        make_database(root, rng)
    else:
        update_database(root, random.Random(2))


if __name__ == "__main__":
    main()

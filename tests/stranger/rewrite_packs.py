#!/usr/bin/env python3
"""Writes every pack of a vault again as its next generation, with the blobs emptied that no restore point needs.

    rewrite_packs.py VAULT KEYRING TENANT

What pruning and rekeying do to packs, as docs/FORMAT.md describes generations: so that the readers of a version which
does neither are known to bear it.
"""

import os
import struct
import sys
from pathlib import Path

import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from read_vault import DATA_PACK, FANOUT, IDS_ORDINAL, LENGTHS_ORDINAL, MANIFEST, CLUSTER, Vault, encode_name, identifier, nonce


def walk(vault, place, level, needed):
    needed.add((place[0], place[2]))
    for child in vault.node(place, level):
        if child is not None and level > 0:
            walk(vault, child, level - 1, needed)
        elif child is not None:
            needed.add((child[0], child[2]))


def rewrite(vault, pack, needed, epoch):
    """The next generation of a pack, and how many blobs it has emptied."""
    salt, generation = os.urandom(32), pack.generation + 1
    key = vault.derive(vault.deks[epoch], salt, pack.kind, pack.id)

    def seal(ordinal, plain):
        aad = struct.pack("<H", 1) + vault.scope + bytes([pack.kind]) + pack.id
        return AESGCM(key).encrypt(nonce(ordinal), plain, aad + struct.pack("<III", generation, ordinal, len(plain)))

    count, blobs, ids = len(pack.lengths), [], b""
    for ordinal in range(count):
        live = (pack.id, ordinal) in needed
        blobs.append(seal(ordinal, pack.blob(ordinal)[0]) if live else b"")
        ids += pack.ids[ordinal] if live else bytes(32)
    data = b"".join(blobs)
    trailer = struct.pack(
        "<8sHBBI16sIIQQ32s", b"RSLPACK1", 1, pack.kind, 0, generation, pack.id, epoch, count, len(data), 0, salt
    )
    data += seal(IDS_ORDINAL, ids) + seal(LENGTHS_ORDINAL, struct.pack(f"<{count}I", *map(len, blobs))) + trailer
    return data + blake3.blake3(data).digest() + b"1KCAPLSR", blobs.count(b"")


def main(folder, keyring, tenant):
    vault = Vault(Path(folder), Path(keyring), tenant)
    needed = set()
    for vm in vault.vms():
        for number in (number for number, forgotten in vault.point_files(vm).items() if not forgotten):
            path = vault.folder / "vms" / encode_name(vm) / f"{number:08}.manifest"
            for disk in vault.open_object(path, MANIFEST)[0]["disks"]:
                if disk["root"] is not None:
                    count = -(-disk["length"] // CLUSTER)
                    level = next(level for level in range(4) if count <= FANOUT ** (level + 1))
                    root = disk["root"]
                    walk(vault, (identifier(root["pack"]), root["generation"], root["ordinal"]), level, needed)
    emptied = 0
    for path in list((vault.folder / "packs").glob("*/*.0")):
        pack = vault.pack(identifier(path.name[:-2]), 0)
        (epoch,) = struct.unpack_from("<I", pack.data, len(pack.data) - 96)
        data, count = rewrite(vault, pack, needed, epoch)
        emptied += count
        path.with_suffix(".1").write_bytes(data)
        path.unlink()
    print(emptied)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])

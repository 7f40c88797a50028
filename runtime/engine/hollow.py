"""A shared library's names without its contents: it loads in no time and takes no memory.

Knows ELF for x86-64 alone. Source: the System V ABI, chapters 4 and 5, and for the versions of
symbols the Linux Standard Base, chapter 10.
"""

import mmap
import struct
from dataclasses import dataclass

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_ENTRY = struct.Struct("<QQ")  # of the dynamic section

_IDENT, _LIBRARY, _X86_64 = b"\x7fELF\x02\x01\x01", 3, 62
_PAGE = 4096
_READ, _WRITE, _EXECUTE = 4, 2, 1
_LOAD, _DYNAMIC, _STACK = 1, 2, 0x6474E551

# What the loader looks names up in: the kind of section, and the entry that points to it.
_TABLES = {
    11: 6,  # symbols
    3: 5,  # their names
    0x6FFFFFF6: 0x6FFFFEF5,  # hashes of the names
    0x6FFFFFFF: 0x6FFFFFF0,  # each symbol's version
    0x6FFFFFFD: 0x6FFFFFFC,  # the names of versions
}
_SYMBOLS, _NAMES, _HASHES, _, _VERSIONS = _TABLES
_DYNAMIC_SECTION = 6
_SONAME, _NAMES_BYTES, _SYMBOL_BYTES, _VERSION_COUNT = 14, 10, 11, 0x6FFFFFFD
_UNDEFINED, _ABSOLUTE = 0, 0xFFF1
_GLOBAL, _FUNCTION = 1, 2

_RETURN_1 = b"\xb8\x01\x00\x00\x00\xc3"  # mov eax, 1; ret


class NotALibraryError(ValueError):
    """These bytes are no shared library for x86-64 whose names can be read."""


@dataclass(frozen=True, slots=True)
class _Section:
    kind: int
    link: int  # the number of the section with its names
    count: int
    content: bytes


def hollow_out(library: bytes | mmap.mmap) -> bytes:
    """Return a library with the same name, functions and versions; each function returns 1.

    Raises:
        NotALibraryError: `library` is something else, or has variables too.
    """
    tables, soname = _read(library)
    code_at = _HEADER.size + 4 * _PROGRAM.size
    body = bytearray(code_at) + _RETURN_1
    entries = [
        (_SONAME, soname),
        (_NAMES_BYTES, len(tables[_NAMES].content)),
        (_SYMBOL_BYTES, _SYMBOL.size),
    ]
    if _VERSIONS in tables:
        entries.append((_VERSION_COUNT, tables[_VERSIONS].count))
    for kind, table in tables.items():
        body += bytes(-len(body) % 8)
        entries.append((_TABLES[kind], len(body)))
        body += _all_at(code_at, table.content) if kind == _SYMBOLS else table.content
    body += bytes(-len(body) % _PAGE)
    dynamic = b"".join(_ENTRY.pack(*entry) for entry in [*entries, (0, 0)])
    body[:code_at] = _head(len(body), len(dynamic))
    return bytes(body) + dynamic


def _read(library: bytes | mmap.mmap) -> tuple[dict[int, _Section], int]:
    """Return the tables by kind, and where among the names the library's own begins."""
    try:
        sections = _sections(library)
        found = {section.kind: section for section in reversed(sections)}
        tables = {kind: found[kind] for kind in _TABLES if kind in found}
        # There are several tables of names, and this one is the symbols'.
        tables[_NAMES] = sections[tables[_SYMBOLS].link]
        soname = dict(_ENTRY.iter_unpack(found[_DYNAMIC_SECTION].content))[_SONAME]
    except (struct.error, LookupError) as error:
        raise NotALibraryError("Its names cannot be read.") from error
    if _HASHES not in tables:
        raise NotALibraryError("It has no hashes of its names.")
    return tables, soname


def _sections(library: bytes | mmap.mmap) -> list[_Section]:
    ident, kind, machine, *_, begin, _, _, _, _, size, count, _ = _HEADER.unpack(
        library[: _HEADER.size]
    )
    if (ident[: len(_IDENT)], kind, machine) != (_IDENT, _LIBRARY, _X86_64):
        raise NotALibraryError("It is not a shared library for x86-64.")
    table = library[begin : begin + size * count]
    kept = {*_TABLES, _DYNAMIC_SECTION}
    return [
        _Section(kind, link, count, library[offset : offset + size] if kind in kept else b"")
        for _, kind, _, _, offset, size, link, count, _, _ in _SECTION.iter_unpack(table)
    ]


def _all_at(address: int, symbols: bytes) -> bytes:
    """Return the symbols with each function at `address`.

    Weak ones become undefined. They are C++ templates that every library which needs one has too,
    and the loader might choose this copy for all of them.
    """
    moved = bytearray()
    for name, kind, visibility, section, value, size in _SYMBOL.iter_unpack(symbols):
        place = section, value, size
        if section not in (_UNDEFINED, _ABSOLUTE):
            if kind >> 4 != _GLOBAL:
                place = _UNDEFINED, 0, 0
            elif kind & 0xF == _FUNCTION:
                place = section, address, len(_RETURN_1)
            else:
                raise NotALibraryError("It has variables, which others would read.")
        moved += _SYMBOL.pack(name, kind, visibility, *place)
    return bytes(moved)


def _head(body_bytes: int, dynamic_bytes: int) -> bytes:
    """Return the header of a file that holds the body, then, on pages of its own, the rest.

    The loader writes to what is dynamic, so that it cannot lie on the pages with code.
    """
    programs = [
        (_LOAD, _READ | _EXECUTE, 0, body_bytes),
        (_LOAD, _READ | _WRITE, body_bytes, dynamic_bytes),
        (_DYNAMIC, _READ | _WRITE, body_bytes, dynamic_bytes),
        (_STACK, _READ | _WRITE, 0, 0),  # without this the stack would become executable
    ]
    header = _HEADER.pack(
        *(_IDENT, _LIBRARY, _X86_64, 1, 0, _HEADER.size, 0, 0),
        *(_HEADER.size, _PROGRAM.size, len(programs), 0, 0, 0),
    )
    return header + b"".join(
        _PROGRAM.pack(kind, access, at, at, at, size, size, _PAGE if kind == _LOAD else 8)
        for kind, access, at, size in programs
    )

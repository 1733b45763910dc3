"""A PEFT folder as one body: zip, tar, tar.gz, or the parts of a multipart form.

Nothing is unpacked to the disk, so no name in an archive is ever a path. Members are read into
memory, and every byte is counted as it inflates: the sum of all of them has a bound, whatever the
archive says of its own sizes. Wanted are adapter_config.json and adapter_model.safetensors in one
folder, wherever that is; of several such folders the outermost.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from stat import S_ISLNK
from typing import IO, NoReturn

from adapters.peft import TENSOR_FILE, PeftFolder
from adapters.peft_config import CONFIG_FILE, MAX_CONFIG_BYTES, PeftRefused
from adapters.storage_errors import opened

MAX_MEMBERS = 1000
MAX_DIRECTORY_BYTES = 1 << 20  # of a zip's central directory
MAX_EXTENSIONS = 2 * MAX_MEMBERS  # headers of a tar that say more of the next member
MAX_PART_HEAD_BYTES = 2 << 10
READ_BYTES = 256 << 10
OVERHEAD_BYTES = 4 << 20  # of other files in the folder and of a tar's blocks

_WANTED = (CONFIG_FILE, TENSOR_FILE)
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_JUNK = ("__MACOSX", ".DS_Store")


class Form(Enum):
    ZIP = auto()
    TAR = auto()
    TAR_GZ = auto()
    MULTIPART = auto()


@dataclass
class _Found:
    """The wanted files by folder, and what else was seen."""

    files: dict[tuple[str, ...], dict[str, bytearray]] = field(default_factory=dict)
    pickles: set[tuple[str, ...]] = field(default_factory=set)
    others: int = 0
    members: int = 0
    extensions: int = 0


def read_archive(path: Path, form: Form, max_bytes: int, boundary: str = "") -> PeftFolder:
    """The PEFT folder in a file. `max_bytes` bounds the tensor file.

    Raises PeftRefused, whose reason is `archive` where the archive is at fault, or Unreadable.
    """
    found = _Found()
    budget = _Budget(max_bytes + MAX_CONFIG_BYTES + OVERHEAD_BYTES)
    with opened(path) as file:
        if form is Form.ZIP:
            _read_zip(file, found, budget)
        elif form is Form.MULTIPART:
            _read_multipart(file.read(), boundary.encode("ascii"), found)
        else:
            _read_tar(_Source(file, budget, gzip=form is Form.TAR_GZ), found)
    return _folder_of(found, max_bytes)


class _Budget:
    """Bytes that may still be inflated."""

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            _refuse("it holds more bytes than an adapter may have")


def _refuse(why: str) -> NoReturn:
    raise PeftRefused(f"the archive can't be read: {why}", "archive")


def _place(name: str, found: _Found, is_folder: bool = False) -> tuple[tuple[str, ...], str] | None:
    """Folder and file name of a wanted member; None for one that is counted and not read."""
    found.members += 1
    if found.members > MAX_MEMBERS:
        _refuse(f"it has more than {MAX_MEMBERS} members")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        _refuse("a member's name leads out of the folder")
    if is_folder or not parts or any(part in _JUNK or part.startswith("._") for part in parts):
        return None
    if parts[-1] in _WANTED:
        return parts[:-1], parts[-1]
    if parts[-1] in _PICKLES:
        found.pickles.add(parts[:-1])
    found.others += 1
    return None


def _keep(found: _Found, place: tuple[tuple[str, ...], str], content: bytearray) -> None:
    files = found.files.setdefault(place[0], {})
    if place[1] in files:
        _refuse(f"{place[1]} is there twice")
    files[place[1]] = content


def _folder_of(found: _Found, max_bytes: int) -> PeftFolder:
    """The outermost folder that has adapter_config.json, with its tensors."""
    folders = sorted((f for f, files in found.files.items() if CONFIG_FILE in files), key=len)
    if not folders:
        raise PeftRefused(f"there is no {CONFIG_FILE} in the archive", "missing_file")
    if len(folders) > 1 and len(folders[0]) == len(folders[1]):
        raise PeftRefused("the archive has several PEFT folders: send one", "archive")
    files = found.files[folders[0]]
    if TENSOR_FILE not in files:
        if folders[0] in found.pickles:
            raise PeftRefused(
                "adapter_model.bin is a pickle, which is never read: save the adapter again with "
                "model.save_pretrained(folder, safe_serialization=True)",
                "pickle",
            )
        raise PeftRefused(f"there is no {TENSOR_FILE} beside {CONFIG_FILE}", "missing_file")
    config, tensors = files[CONFIG_FILE], files[TENSOR_FILE]
    if len(config) > MAX_CONFIG_BYTES:
        raise PeftRefused(f"{CONFIG_FILE} may have {MAX_CONFIG_BYTES} bytes", "archive")
    if len(tensors) > max_bytes:
        raise PeftRefused(f"{TENSOR_FILE} may have {max_bytes} bytes", "archive")
    unread = sum(len(files) for folder, files in found.files.items() if folder != folders[0])
    return PeftFolder(bytes(config), tensors, found.others + unread)


# Zip.


def _read_zip(file: IO[bytes], found: _Found, budget: _Budget) -> None:
    _check_directory(file)
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                place = _place(info.filename, found, info.filename.endswith("/"))
                if place is not None:
                    _check_member(info, archive.start_dir)
                    with archive.open(info) as member:
                        _keep(found, place, _inflate(member, budget))
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise PeftRefused("the archive can't be read: it is not a sound zip", "archive") from error


def _check_directory(file: IO[bytes]) -> None:
    """The zip's own directory must be small before zipfile reads all of it."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 65_557))
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        _refuse("it is not a zip, or it is cut off")
    members, directory = struct.unpack_from("<HI", tail, at + 10)
    if tail[max(0, at - 20) : at].startswith(b"PK\6\7"):
        _refuse("it is a zip64, which holds more than an adapter may have")
    if members > MAX_MEMBERS or directory > MAX_DIRECTORY_BYTES:
        _refuse(f"it has more than {MAX_MEMBERS} members, or names that are too long")
    file.seek(0)


def _check_member(info: zipfile.ZipInfo, end: int) -> None:
    """Raises PeftRefused. `end` is where the members end and the directory begins."""
    if not 0 <= info.header_offset < end:
        _refuse("a member begins outside of it")
    if S_ISLNK(info.external_attr >> 16):
        _refuse("a member is a link")
    if info.flag_bits & 1:
        _refuse("a member is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        _refuse("a member is compressed by another method than deflate")


def _inflate(member: IO[bytes], budget: _Budget) -> bytearray:
    content = bytearray()
    while part := member.read(READ_BYTES):
        budget.take(len(part))
        content += part
    return content


# Tar, read by ourselves: the library reads headers of any size, with expressions of quadratic time.

_BLOCK = 512
_MAX_EXTENSION_BYTES = 64 << 10
_LEAST_RECORD = 5  # bytes of an extended header's record: "5 a=" and a line end
_FILES, _FOLDER, _LONG_NAME, _PAX, _PAX_GLOBAL = (b"0", b"\0", b"7"), b"5", b"L", b"x", b"g"


class _Source:
    """Bytes of a file, inflated where it is gzip. Every byte is counted, also those passed over."""

    def __init__(self, file: IO[bytes], budget: _Budget, gzip: bool) -> None:
        self._file, self._budget = file, budget
        self._inflater = zlib.decompressobj(wbits=31) if gzip else None
        self._unread = b""

    def read(self, size: int) -> bytearray:
        """Exactly `size` bytes. Raises PeftRefused."""
        content = bytearray()
        while len(content) < size:
            part = self._part(min(size - len(content), READ_BYTES))
            if not part:
                _refuse("it is cut off")
            self._budget.take(len(part))
            content += part
        return content

    def skip(self, size: int) -> None:
        while size > 0:
            size -= len(self.read(min(size, READ_BYTES)))

    def finish(self) -> None:
        """Read to the end of a gzip, so that its checksum is looked at. Raises PeftRefused."""
        while part := self._part(READ_BYTES):
            self._budget.take(len(part))
        if self._inflater is not None and not self._inflater.eof:
            _refuse("it is cut off")

    def _part(self, size: int) -> bytes:
        """At most so many bytes, none at the end."""
        if self._inflater is None:
            return self._file.read(size)
        part = b""
        while not part and not self._inflater.eof:
            source = self._unread or self._file.read(64 << 10)
            if not source:
                break
            part = self._inflater.decompress(source, size)
            self._unread = self._inflater.unconsumed_tail
        return part


def _read_tar(source: _Source, found: _Found) -> None:
    try:
        name = None  # what an extension says of the next member
        while any(block := source.read(_BLOCK)):  # a block of zeros is the end
            name = _read_tar_member(source, block, name, found)
        source.finish()
    except (zlib.error, ValueError) as error:
        raise PeftRefused("the archive can't be read: it is not a sound tar", "archive") from error


def _read_tar_member(
    source: _Source, block: bytearray, name: str | None, found: _Found
) -> str | None:
    """Reads the member of a header block; the name that it is an extension for, if it is one."""
    if sum(block) - sum(block[148:156]) + 8 * 32 != _octal(block[148:156]):
        _refuse("it is not a tar")
    kind, size = bytes(block[156:157]), _octal(block[124:136])
    padding = -size % _BLOCK
    if kind in (_LONG_NAME, _PAX, _PAX_GLOBAL):
        found.extensions += 1
        if size > _MAX_EXTENSION_BYTES or found.extensions > MAX_EXTENSIONS:
            _refuse("a member's extensions are too long, or too many")
        extension = bytes(source.read(size + padding)[:size])
        if kind == _PAX_GLOBAL:
            return name
        return _text(extension) if kind == _LONG_NAME else _pax_name(extension) or name
    if kind not in (*_FILES, _FOLDER):
        _refuse("a member is a link, a device or sparse")
    prefix = _text(block[345:500]) if block[257:262] == b"ustar" and block[263:265] == b"00" else ""
    own = _text(block[:100])
    place = _place(name or (f"{prefix}/{own}" if prefix else own), found, kind == _FOLDER)
    if place is None:
        source.skip(size + padding)
    else:
        _keep(found, place, source.read(size))
        source.skip(padding)
    return None


def _octal(field_: bytearray) -> int:
    """Raises ValueError; sizes of 8 GiB and more are said in another way, which is none here."""
    text = field_.strip(b" \0")
    return int(text, 8) if text else 0


def _text(raw: bytes | bytearray) -> str:
    return bytes(raw).partition(b"\0")[0].decode("utf-8", "replace")


def _pax_name(extension: bytes) -> str | None:
    """`path` of an extended header: records of "LENGTH KEY=VALUE" and a line end."""
    name, at = None, 0
    while at < len(extension):
        length = int(extension[at : at + 7].partition(b" ")[0])
        record = extension[at : at + length]
        at += length
        if length < _LEAST_RECORD or not record.endswith(b"\n"):
            _refuse("a member's extension is not sound")
        key, _, value = record.partition(b" ")[2].rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "replace")
        elif key == b"size" or key.startswith(b"GNU.sparse"):
            _refuse("a member is sparse, or of 8 GiB and more")
    return name


# Multipart.


def _read_multipart(body: bytes, boundary: bytes, found: _Found) -> None:
    for head, content in _parts(body, b"--" + boundary):
        place = _place(_part_name(head), found)
        if place is not None:
            _keep(found, place, bytearray(content))


def _parts(body: bytes, delimiter: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(head, content) of each part (RFC 2046): CRLF, the delimiter, CRLF or -- for the last."""
    at = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    if at == 1:
        _refuse("its boundary is not there")
    view = memoryview(body)
    while True:
        at += len(delimiter)
        if body.startswith(b"--", at):
            return
        line = body.find(b"\r\n", at, at + 100)
        end = body.find(b"\r\n" + delimiter, max(line, at))
        if line < 0 or end < 0 or body[at:line].strip(b" \t"):
            _refuse("it is not sound multipart, or it is cut off")
        split = body.find(b"\r\n\r\n", line, line + MAX_PART_HEAD_BYTES)
        if not line <= split <= end:
            _refuse("a part has no headers, or too long ones")
        yield body[line:split], view[split + 4 : end]
        at = end + 2


def _part_name(head: bytes) -> str:
    """A part's file name, or the field's where that is the file's: -F adapter_config.json=@x."""
    fields: dict[str, str] = {}
    for line in head.split(b"\r\n"):
        name, _, value = line.decode("utf-8", "replace").partition(":")
        fields[name.strip().lower()] = value.strip()
    if fields.get("content-transfer-encoding", "binary").lower() not in ("binary", "8bit", "7bit"):
        _refuse("a part has a Content-Transfer-Encoding")
    options: dict[str, str] = {}
    for option in fields.get("content-disposition", "").split(";")[1:]:
        key, _, value = option.strip().partition("=")
        options[key.lower()] = value.strip('"')
    field_name, file_name = options.get("name", ""), options.get("filename", "")
    return field_name if field_name in _WANTED else (file_name or field_name or "unnamed")

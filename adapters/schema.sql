-- The registry: names, immutable versions, pointers moved by compare-and-set, and who did what.
CREATE TABLE IF NOT EXISTS blobs (
    digest     TEXT PRIMARY KEY,
    bytes      INTEGER NOT NULL,
    mtime_ns   INTEGER NOT NULL,
    record     TEXT NOT NULL,               -- JSON: manifest, metadata, probe delta
    pinned     INTEGER NOT NULL DEFAULT 0,
    damaged    INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;

-- /metrics counts the damaged ones; a record may be long, and a scan would read every one.
CREATE INDEX IF NOT EXISTS damaged_blobs ON blobs (digest) WHERE damaged;

CREATE TABLE IF NOT EXISTS versions (
    name       TEXT NOT NULL,
    number     INTEGER NOT NULL,
    digest     TEXT NOT NULL,
    created_at REAL NOT NULL,
    deleted_at REAL,                        -- a tombstone: the number is never used again
    PRIMARY KEY (name, number)
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS versions_by_digest ON versions (digest, deleted_at);

-- A name's own pointer has the alias 'current'. A row stays, with number NULL, when what it
-- pointed to is deleted, so that generations only grow.
CREATE TABLE IF NOT EXISTS pointers (
    name       TEXT NOT NULL,
    alias      TEXT NOT NULL,
    number     INTEGER,
    previous   INTEGER,
    generation INTEGER NOT NULL,
    PRIMARY KEY (name, alias)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS audit (
    id     INTEGER PRIMARY KEY,
    at     REAL NOT NULL,
    who    TEXT NOT NULL,
    action TEXT NOT NULL,
    name   TEXT NOT NULL,
    detail TEXT NOT NULL                    -- JSON
);

-- How many transactions have changed the registry: registry.mark has the last acknowledged one.
CREATE TABLE IF NOT EXISTS commits (
    one    INTEGER PRIMARY KEY CHECK (one = 1),
    number INTEGER NOT NULL
);

INSERT OR IGNORE INTO commits (one, number) VALUES (1, 0);

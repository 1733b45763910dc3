-- What is kept of the past: adapters/history.py says how much.
CREATE INDEX IF NOT EXISTS audit_by_name ON audit (name, id);

-- Names without a live version, in the order of their deletion.
CREATE TABLE IF NOT EXISTS deleted_names (
    id   INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
);

-- The last version number and generation that were ever given to a name of this bucket whose rows
-- are no longer kept: a new name of the bucket begins behind them.
CREATE TABLE IF NOT EXISTS floors (
    bucket     INTEGER PRIMARY KEY,
    number     INTEGER NOT NULL,
    generation INTEGER NOT NULL
);

-- The same by namespace, so that no namespace's numbers are seen in another.
CREATE TABLE IF NOT EXISTS namespace_floors (
    namespace  TEXT NOT NULL,
    bucket     INTEGER NOT NULL,
    number     INTEGER NOT NULL,
    generation INTEGER NOT NULL,
    PRIMARY KEY (namespace, bucket)
) WITHOUT ROWID;

-- Files of the adapter folder that were published or found known: never published again.
CREATE TABLE IF NOT EXISTS folder_files (
    name   TEXT NOT NULL,
    digest TEXT NOT NULL,
    PRIMARY KEY (name, digest)
) WITHOUT ROWID;

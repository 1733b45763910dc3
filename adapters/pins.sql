-- Pins belong to a version of a name. A pin goes with its version, in the same transaction.
CREATE TABLE pins (
    name   TEXT NOT NULL,
    number INTEGER NOT NULL,
    key    TEXT NOT NULL,                   -- id of the API key that pinned it; '' without one
    at     REAL NOT NULL,
    PRIMARY KEY (name, number)
) WITHOUT ROWID;

CREATE TRIGGER pin_of_a_removed_version AFTER UPDATE OF deleted_at ON versions
WHEN NEW.deleted_at IS NOT NULL
BEGIN
    DELETE FROM pins WHERE name = NEW.name AND number = NEW.number;
END;

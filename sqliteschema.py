"""The schema of the SQLite file, and times by its own clock."""

from conversations import LEASE_SECONDS

MIGRATIONS = (
    """
    -- Order and cursors follow these numbers, never a clock, and a number is not given twice.
    CREATE TABLE sequence (value INTEGER NOT NULL);
    INSERT INTO sequence VALUES (0);

    CREATE TABLE threads (
        id TEXT PRIMARY KEY,
        user_id TEXT NOT NULL,
        created_at TEXT NOT NULL,
        title TEXT,
        status TEXT NOT NULL,
        allowed_image_domains TEXT,
        metadata TEXT NOT NULL,
        activity INTEGER NOT NULL,  -- the sequence number of the newest item
        active_at REAL NOT NULL,  -- when it came, in seconds since 1970 by SQLite's clock
        UNIQUE (id, user_id)
    );
    CREATE INDEX threads_by_activity ON threads (user_id, activity);

    CREATE TABLE items (
        seq INTEGER PRIMARY KEY,
        thread_id TEXT NOT NULL,
        user_id TEXT NOT NULL,
        id TEXT NOT NULL,
        type TEXT NOT NULL,
        body TEXT NOT NULL,
        UNIQUE (thread_id, id),
        FOREIGN KEY (thread_id, user_id) REFERENCES threads (id, user_id) ON DELETE CASCADE
    );
    CREATE INDEX items_by_thread ON items (thread_id, user_id, seq);

    -- One row while a turn runs on the thread. A row that ran out is a turn that died.
    CREATE TABLE leases (
        thread_id TEXT PRIMARY KEY,
        user_id TEXT NOT NULL,
        lease TEXT NOT NULL UNIQUE,
        expires_at REAL NOT NULL,  -- seconds since 1970 by SQLite's clock
        FOREIGN KEY (thread_id, user_id) REFERENCES threads (id, user_id) ON DELETE CASCADE
    );

    -- Items that a running turn has shown but not finished, as they would be stored if it ended now.
    CREATE TABLE checkpoints (
        seq INTEGER PRIMARY KEY,
        thread_id TEXT NOT NULL,
        user_id TEXT NOT NULL,
        id TEXT NOT NULL,
        type TEXT NOT NULL,
        body TEXT NOT NULL,
        UNIQUE (thread_id, id),
        FOREIGN KEY (thread_id, user_id) REFERENCES threads (id, user_id) ON DELETE CASCADE
    );

    CREATE TABLE feedback (
        thread_id TEXT NOT NULL,
        item_id TEXT NOT NULL,
        user_id TEXT NOT NULL,
        kind TEXT NOT NULL,
        updated_at TEXT NOT NULL,
        PRIMARY KEY (thread_id, item_id, user_id),
        FOREIGN KEY (thread_id, item_id) REFERENCES items (thread_id, id) ON DELETE CASCADE
    );

    CREATE TABLE usage (
        user_id TEXT NOT NULL,
        day TEXT NOT NULL,  -- YYYY-MM-DD, UTC
        model TEXT NOT NULL,
        requests INTEGER NOT NULL,
        input_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        PRIMARY KEY (user_id, day, model)
    );

    -- Turns of the last minute, for the quota.
    CREATE TABLE turn_starts (
        user_id TEXT NOT NULL,
        started_at REAL NOT NULL  -- seconds since 1970 by SQLite's clock
    );
    CREATE INDEX turn_starts_by_user ON turn_starts (user_id, started_at);

    CREATE TABLE attachments (
        id TEXT PRIMARY KEY,
        user_id TEXT NOT NULL,
        thread_id TEXT,  -- null until it is sent
        body TEXT NOT NULL,
        size INTEGER NOT NULL,  -- bytes, as announced or as they came
        upload TEXT,  -- the name of the upload that may write chunks
        is_complete INTEGER NOT NULL,
        created_at REAL NOT NULL,
        FOREIGN KEY (thread_id, user_id) REFERENCES threads (id, user_id) ON DELETE CASCADE
    );
    CREATE INDEX attachments_by_thread ON attachments (thread_id, user_id);
    CREATE INDEX attachments_by_user ON attachments (user_id);

    CREATE TABLE attachment_chunks (
        attachment_id TEXT NOT NULL REFERENCES attachments (id) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (attachment_id, number)
    );

    CREATE TABLE secrets (name TEXT PRIMARY KEY, value BLOB NOT NULL);
    INSERT INTO secrets VALUES ('links', randomblob(32));

    CREATE TABLE jobs (name TEXT PRIMARY KEY, ran_at REAL NOT NULL);
    INSERT INTO jobs VALUES ('purge', 0);
    """,
)
"""Append only: the number of entries is the schema's version. A migration leaves the previous release working."""

NOW_TEXT = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')"
NOW = "((julianday('now') - 2440587.5) * 86400.0)"
RAN_OUT = f"expires_at NOT BETWEEN {NOW} AND {NOW} + {LEASE_SECONDS}"
"""A lease from further ahead than a lease can be was made before the clock was set back."""

"""The schema of the tables in PostgreSQL, and times by its own clock."""

from conversations import LEASE_SECONDS

MIGRATIONS = (
    """
    -- Keys compare byte by byte: an index on them outlives an upgrade of the system's collations.
    CREATE DOMAIN @key AS text COLLATE "C";

    -- Order and cursors follow these numbers, never a clock. They are drawn while the thread's row is locked, so that
    -- in one thread their order is the order of the commits.
    CREATE SEQUENCE @seq;

    -- JSON is kept as text: jsonb refuses what JSON may hold (\\u0000).
    CREATE TABLE @threads (
        id @key PRIMARY KEY,
        user_id @key NOT NULL,
        created_at text NOT NULL,
        title text,
        status text NOT NULL,
        allowed_image_domains text,
        metadata text NOT NULL,
        activity bigint NOT NULL,  -- the sequence number of the newest item
        active_at timestamptz NOT NULL,  -- when it came
        lease @key,  -- null unless a turn runs; one that ran out is of a turn that died
        lease_expires_at timestamptz,
        UNIQUE (id, user_id)
    );
    CREATE INDEX @threads_by_activity ON @threads (user_id, activity);
    CREATE UNIQUE INDEX @threads_by_lease ON @threads (lease) WHERE lease IS NOT NULL;
    CREATE INDEX @threads_with_lease ON @threads (user_id) WHERE lease IS NOT NULL;

    CREATE TABLE @items (
        seq bigint PRIMARY KEY,
        thread_id @key NOT NULL,
        user_id @key NOT NULL,
        id @key NOT NULL,
        type text NOT NULL,
        body text NOT NULL,
        UNIQUE (thread_id, id),
        FOREIGN KEY (thread_id, user_id) REFERENCES @threads (id, user_id) ON DELETE CASCADE
    );
    CREATE INDEX @items_by_thread ON @items (thread_id, user_id, seq);

    -- Items that a running turn has shown but not finished, as they would be stored if it ended now.
    CREATE TABLE @checkpoints (
        seq bigint PRIMARY KEY,
        thread_id @key NOT NULL,
        user_id @key NOT NULL,
        id @key NOT NULL,
        type text NOT NULL,
        body text NOT NULL,
        UNIQUE (thread_id, id),
        FOREIGN KEY (thread_id, user_id) REFERENCES @threads (id, user_id) ON DELETE CASCADE
    );

    CREATE TABLE @feedback (
        thread_id @key NOT NULL,
        item_id @key NOT NULL,
        user_id @key NOT NULL,
        kind text NOT NULL,
        updated_at timestamptz NOT NULL,
        PRIMARY KEY (thread_id, item_id, user_id),
        FOREIGN KEY (thread_id, item_id) REFERENCES @items (thread_id, id) ON DELETE CASCADE
    );

    CREATE TABLE @usage (
        user_id @key NOT NULL,
        day date NOT NULL,  -- UTC
        model @key NOT NULL,
        requests bigint NOT NULL,
        input_tokens bigint NOT NULL,
        output_tokens bigint NOT NULL,
        PRIMARY KEY (user_id, day, model)
    );

    -- Turns of the last minute, for the quota.
    CREATE TABLE @turn_starts (user_id @key NOT NULL, started_at timestamptz NOT NULL);
    CREATE INDEX @turn_starts_by_user ON @turn_starts (user_id, started_at);

    CREATE TABLE @attachments (
        id @key PRIMARY KEY,
        user_id @key NOT NULL,
        thread_id @key,  -- null until it is sent
        body text NOT NULL,
        size bigint NOT NULL,  -- bytes, as announced or as they came
        upload @key,  -- the name of the upload that may write chunks
        is_complete boolean NOT NULL,
        created_at timestamptz NOT NULL,
        FOREIGN KEY (thread_id, user_id) REFERENCES @threads (id, user_id) ON DELETE CASCADE
    );
    CREATE INDEX @attachments_by_thread ON @attachments (thread_id, user_id);
    CREATE INDEX @attachments_by_user ON @attachments (user_id);

    CREATE TABLE @attachment_chunks (
        attachment_id @key NOT NULL REFERENCES @attachments (id) ON DELETE CASCADE,
        number integer NOT NULL,
        data bytea NOT NULL,
        PRIMARY KEY (attachment_id, number)
    );
    ALTER TABLE @attachment_chunks ALTER COLUMN data SET STORAGE EXTERNAL;  -- what people send is compressed already

    CREATE TABLE @secrets (name @key PRIMARY KEY, value bytea NOT NULL);
    INSERT INTO @secrets VALUES ('links', sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
        || uuid_send(gen_random_uuid())));  -- 366 random bits

    CREATE TABLE @jobs (name @key PRIMARY KEY, ran_at timestamptz NOT NULL);
    INSERT INTO @jobs VALUES ('purge', 'epoch');
    """,
)
"""Append only: the number of entries is the schema's version. A migration leaves the previous release working.

`@` stands for TABLE_PREFIX, here and in every statement.
"""

NOW = "clock_timestamp()"  # now() would be the transaction's start: before it waited for a lock
RAN_OUT = f"lease_expires_at NOT BETWEEN {NOW} AND {NOW} + interval '{LEASE_SECONDS} seconds'"
"""A lease from further ahead than a lease can be was made before the clock was set back."""
TODAY = f"({NOW} AT TIME ZONE 'UTC')::date"

ALTER TABLE predictions ADD COLUMN consent text NOT NULL DEFAULT 'unstated';

CREATE TABLE requests (
    key text PRIMARY KEY,
    prediction_id text NOT NULL UNIQUE,
    fingerprint text NOT NULL,
    claimed_at timestamptz NOT NULL,
    answered_at timestamptz,
    explanation jsonb
);

CREATE TABLE erasures (
    prediction_id text PRIMARY KEY,
    requested_at timestamptz NOT NULL,
    reason text NOT NULL,
    by text NOT NULL,
    finished_at timestamptz
);

CREATE INDEX erasures_unfinished ON erasures (requested_at) WHERE finished_at IS NULL;

ALTER TABLE feedback
    DROP CONSTRAINT feedback_prediction_id_fkey,
    ADD CONSTRAINT feedback_prediction_id_fkey FOREIGN KEY (prediction_id) REFERENCES predictions (id) ON DELETE CASCADE;

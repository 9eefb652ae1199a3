CREATE TABLE predictions (
    id text PRIMARY KEY,
    created_at timestamptz NOT NULL,
    sha256 text NOT NULL,
    object_key text NOT NULL,
    label text,
    probabilities jsonb NOT NULL,
    gate_accepted boolean NOT NULL,
    gate_score double precision NOT NULL,
    gate_threshold double precision NOT NULL,
    gate_reason text NOT NULL,
    model_version text NOT NULL,
    data_version text NOT NULL,
    simulated_model boolean NOT NULL,
    seconds double precision NOT NULL,
    width integer NOT NULL,
    height integer NOT NULL
);

CREATE INDEX predictions_created_at ON predictions (created_at);

CREATE TABLE feedback (
    prediction_id text NOT NULL REFERENCES predictions (id),
    reader text NOT NULL,
    verdict text NOT NULL,
    label text,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (prediction_id, reader),
    CHECK ((verdict = 'correct') = (label IS NOT NULL))
);

CREATE TABLE promotions (
    run_id text PRIMARY KEY,
    created_at timestamptz NOT NULL,
    version text NOT NULL,
    previous text,
    promoted boolean NOT NULL,
    checks jsonb NOT NULL,
    metrics jsonb NOT NULL
);

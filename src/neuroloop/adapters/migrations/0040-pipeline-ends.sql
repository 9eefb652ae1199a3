-- How the runs of each DAG ended: one row an outcome, the latest. Nothing here grows.
CREATE TABLE pipeline_ends (
    dag text NOT NULL,
    outcome text NOT NULL,
    run_id text NOT NULL,
    task text NOT NULL,
    ended_at timestamptz NOT NULL,
    PRIMARY KEY (dag, outcome)
);

-- What the live figures look at: the latest verdicts, and the first and the latest answers of a model.
CREATE INDEX feedback_created_at ON feedback (created_at);
CREATE INDEX predictions_model_version ON predictions (model_version, created_at);

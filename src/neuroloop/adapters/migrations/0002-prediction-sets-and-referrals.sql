ALTER TABLE predictions
    ADD COLUMN prediction_sets jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN refer boolean NOT NULL DEFAULT false,
    ADD COLUMN refer_reason text NOT NULL DEFAULT '';

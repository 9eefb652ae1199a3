ALTER TABLE predictions ADD COLUMN gate_novelty double precision NOT NULL DEFAULT 0;

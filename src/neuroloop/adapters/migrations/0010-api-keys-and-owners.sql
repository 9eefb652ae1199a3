CREATE TABLE api_keys (
    id text PRIMARY KEY,
    name text NOT NULL,
    role text NOT NULL CHECK (role IN ('uploader', 'reader', 'admin')),
    delegates boolean NOT NULL,
    digest text NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz,
    revoked_at timestamptz
);

ALTER TABLE predictions ADD COLUMN owner text NOT NULL DEFAULT '';

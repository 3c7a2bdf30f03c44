CREATE TABLE decisions (
    id VARCHAR(64) NOT NULL, reply_id VARCHAR(200) NOT NULL, time FLOAT(53) NOT NULL, key VARCHAR(64) NOT NULL,
    requested VARCHAR(200) NOT NULL, expert VARCHAR(200) NOT NULL, chosen VARCHAR(200) NOT NULL, reason TEXT NOT NULL,
    propensity FLOAT(53), expected TEXT NOT NULL, price_of_error FLOAT(53), best_price FLOAT(53), price FLOAT(53) NOT NULL,
    estimated BOOLEAN NOT NULL, input_tokens BIGINT NOT NULL, output_tokens BIGINT NOT NULL, first_byte_s FLOAT(53),
    latency_s FLOAT(53), status INTEGER NOT NULL, outcome VARCHAR(20) NOT NULL, attempts INTEGER NOT NULL,
    streamed BOOLEAN NOT NULL, fast_path BOOLEAN NOT NULL, PRIMARY KEY (id)
);
CREATE INDEX decisions_by_key ON decisions (key, time, price);
CREATE INDEX decisions_by_reply ON decisions (reply_id, key);
CREATE INDEX decisions_by_time ON decisions (time);
CREATE TABLE feedback (
    decision VARCHAR(64) NOT NULL, key VARCHAR(64) NOT NULL, quality FLOAT(53) NOT NULL, time FLOAT(53) NOT NULL,
    PRIMARY KEY (decision, key)
);
CREATE INDEX feedback_by_time ON feedback (time);
CREATE TABLE keys (
    id VARCHAR(64) NOT NULL, name VARCHAR(200) NOT NULL, hash VARCHAR(64) NOT NULL, experts TEXT, requests_per_minute INTEGER,
    budget FLOAT(53), "window" VARCHAR(20) NOT NULL, zone VARCHAR(64) NOT NULL, admin BOOLEAN NOT NULL,
    created FLOAT(53) NOT NULL, revoked FLOAT(53), PRIMARY KEY (id)
);
CREATE TABLE schema_version (version INTEGER NOT NULL, PRIMARY KEY (version));
CREATE TABLE texts (
    decision VARCHAR(64) NOT NULL, query TEXT NOT NULL, time FLOAT(53) NOT NULL, expires FLOAT(53) NOT NULL,
    PRIMARY KEY (decision)
);
CREATE INDEX texts_by_expiry ON texts (expires);
CREATE INDEX texts_by_time ON texts (time);
INSERT INTO schema_version VALUES (1);
INSERT INTO keys VALUES ('k', 'bob', 'ab', '["small"]', 60, 1.0, 'day', 'UTC', false, 5.0, NULL);
INSERT INTO decisions VALUES
    ('id-1', 'reply-1', 1000.5, 'k', 'auto', 'small', 'small', 'why', 0.9, '{}', 0.02, 0.001, 0.25, false, 10, 20, 0.1, 0.25,
     200, 'ok', 1, false, false),
    ('id-2', '', 1001.5, 'k', 'auto', 'large', 'large', 'why', NULL, '{}', NULL, NULL, 0.5, true, 10, 20, NULL, NULL,
     200, 'ok', 1, true, false);
INSERT INTO feedback VALUES ('id-1', 'k', 0.75, 1002.0);
INSERT INTO texts VALUES ('id-1', 'what?', 1000.5, 1e12);

"""The paper's tables: their training runs, the sampling and scoring of each row, the report, and strips of frames."""

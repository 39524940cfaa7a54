"""Training, evaluation, gates and packaging of one binary task. torch and mlflow are imported where they are used."""

"""Secrets in the environment of a run, and the search for them in all that it leaves."""

import base64
from pathlib import Path

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-4711",
    "GITHUB_TOKEN": "ghp_planted4711",
    "OPENAI_API_KEY": "sk-planted-4711",
    "PGPASSWORD": "planted-password-4711",
}
"""Besides those that a run uses."""


def check_no_secret(folder: Path, *printed: str, used: tuple[str, ...] = ()) -> None:
    """No file in the folder and nothing printed holds a secret, as it is or in base64, which is how
    it goes over the network."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for secret in (*SECRETS.values(), *used):
        for form in (secret.encode(), base64.b64encode(f"api:{secret}".encode())):
            assert not [path for path in files if form in path.read_bytes()], secret
            assert not [text for text in printed if form in text.encode()], secret

"""The example as separate processes on this machine, over TLS, with authenticated nodes:

    python deploy.py [--clients 2] [--forget-digits 7] [--stranger] [--folder federated]

It makes certificates and keys, starts a SuperLink and a SuperNode per client, registers their keys, runs the app once,
and stops everything. In earnest each of these runs where it belongs, with certificates of your own.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent


def write_key(path, key):
    """A private key, readable by nobody else."""
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    path.touch(0o600)
    path.write_bytes(data)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public)


def certificates(folder):
    """ca.crt, and server.pem and server.key for 127.0.0.1."""

    def sign(name, key, issuer, issuer_key, authority):
        now = datetime.now(timezone.utc)
        names = [x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName("localhost")]
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(issuer_key, hashes.SHA256())
        )

    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("loft example CA", "localhost")]
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(sign(names[0], authority, names[0], authority, True).public_bytes(pem))
    (folder / "server.pem").write_bytes(sign(names[1], server, names[0], authority, False).public_bytes(pem))
    (folder / "server.key").touch(0o600)
    (folder / "server.key").write_bytes(
        server.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run(options, place, running):
    """Everything in turn; processes that have to be stopped are in `running`."""
    certificates(place)
    port = free_port()
    address, authority = f"127.0.0.1:{port}", str(place / "ca.crt")
    (place / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\nroot-certificates = "{authority}"\n'
    )
    environment = {
        **os.environ,
        "FLWR_HOME": str(place),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    tls = [
        "--ssl-certfile",
        place / "server.pem",
        "--ssl-keyfile",
        place / "server.key",
        "--ssl-ca-certfile",
        authority,
    ]

    def start(name, *command):
        with open(place / f"{name}.log", "wb") as log:
            running.append(subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log))

    def flwr(*command):
        done = subprocess.run([BIN / "flwr", *command], cwd=HERE, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"flwr {command[0]}: {done.stdout}{done.stderr}")
        return done.stdout

    secure = ("--enable-supernode-auth", "--disable-runtime-dependency-installation")
    start("superlink", BIN / "flower-superlink", "--host", "127.0.0.1", "--port", port, *tls, *secure)
    give_up = time.monotonic() + 60
    while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < give_up:
        time.sleep(0.2)
    for client in range(options.clients + options.stranger):
        key = place / f"client-{client}"
        write_key(key, ec.generate_private_key(ec.SECP384R1()))
        if client < options.clients:
            flwr("supernode", "register", f"{key}.pub", "here")
        identity = ("--auth-supernode-private-key", key, "--auth-supernode-public-key", f"{key}.pub")
        start(
            f"supernode-{client}",
            BIN / "flower-supernode",
            *("--superlink", address, "--root-certificates", authority, *identity, *tls),
            *("--node-config", f"partition-id={client}", "--port", free_port()),
        )
    if options.stranger:
        time.sleep(10)  # it would be in by now
        print("the stranger:", (place / f"supernode-{options.clients}.log").read_text().strip()[-300:])
    # Names are not trusted here: a node is who has its key.
    settings = {"folder": str(Path(options.folder).resolve()), "clients": options.clients, "trust-names": False}
    settings["forget-digits"] = options.forget_digits
    try:
        print(
            flwr(
                "run",
                ".",
                "here",
                "--stream",
                "--run-config",
                " ".join(f"{k}={json.dumps(v)}" for k, v in settings.items()),
            )
        )
    except BaseException:
        for log in sorted(place.glob("*.log")):
            print(f"--- {log.name}", log.read_text()[-3000:], sep="\n", file=sys.stderr)
        raise


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--forget-digits", default="")
    parser.add_argument("--stranger", action="store_true", help="and one more node, whose key nobody registered")
    parser.add_argument("--folder", default="federated")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="loft-deploy-"))
    running = []
    try:
        run(options, place, running)
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()

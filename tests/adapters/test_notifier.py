"""The contract of `ports.Notifier`, by SMTP to the platform's own sink and to others."""

import os
import signal
import smtplib
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult

from neuroloop.adapters.smtp import SmtpNotifier, start_sink
from neuroloop.core.errors import Unavailable
from neuroloop.core.keys import MAIL
from neuroloop.core.mail import parse_mail
from neuroloop.core.schemas import RESEARCH_NOTICE

SENDER, RECEIVERS = "neuroloop@localhost", "ann@example.org, bob@example.org"


def test_a_mail_arrives_with_its_text_and_the_research_notice(smtp_sink):
    SmtpNotifier(smtp_sink.url, SENDER, RECEIVERS).send("Champion: version 2 → 3", "Besser um 1,5 Punkte.\nSo größer.")
    (mail,) = smtp_sink.mails()
    assert mail.subject == "Champion: version 2 → 3"
    assert mail.to == RECEIVERS
    assert mail.body.splitlines() == ["Besser um 1,5 Punkte.", "So größer.", "", "--", RESEARCH_NOTICE]
    assert abs(mail.at - datetime.now(UTC)) < timedelta(minutes=1)


def test_mails_are_kept_in_the_order_they_came(smtp_sink):
    notifier = SmtpNotifier(smtp_sink.url, SENDER, RECEIVERS)
    for number in range(5):
        notifier.send(f"mail {number}", "x")
    assert [mail.subject for mail in smtp_sink.mails()] == [f"mail {number}" for number in range(5)]
    assert all(key.startswith(MAIL) and key.endswith(".eml") for key in smtp_sink.store.list(""))


def test_a_mail_that_is_sent_again_on_the_same_occasion_is_kept_once(smtp_sink):
    notifier = SmtpNotifier(smtp_sink.url, SENDER, RECEIVERS)
    for occasion in ("run 1", "run 1", "run 2", "", ""):
        notifier.send("The build ended", f"on occasion {occasion!r}", once=occasion)
    assert [mail.body.split("'")[1] for mail in smtp_sink.mails()] == ["run 1", "run 2", "", ""]


def test_the_occasion_is_the_message_id_which_tells_any_receiver_and_names_nobody(smtp_sink):
    for sender in (SENDER, "other@example.org"):
        SmtpNotifier(smtp_sink.url, sender, RECEIVERS).send("s", "b", once="gs://bucket/runs/1/send_email.json")
    (key,) = smtp_sink.store.list(MAIL)
    headers = smtp_sink.store.get(key).split(b"\n\n")[0]
    assert b"Message-ID: <" in headers
    assert b"bucket" not in headers


def test_a_line_break_in_the_subject_makes_no_header(smtp_sink):
    SmtpNotifier(smtp_sink.url, SENDER, RECEIVERS).send("run failed\nBcc: eve@example.org", "x")
    (mail,) = smtp_sink.mails()
    assert mail.subject == "run failed Bcc: eve@example.org"


def test_a_text_with_half_a_surrogate_pair_is_sent_with_that_half_written_out(smtp_sink):
    notifier = SmtpNotifier(smtp_sink.url, SENDER, "ann\udce4@example.org, bob@example.org")
    notifier.send("Sch\udce4del.png failed", "of Sch\udce4del.png, größer", once="run \udce4")
    (mail,) = smtp_sink.mails()
    assert mail.subject == "Sch\\udce4del.png failed"
    assert mail.body.splitlines()[0] == "of Sch\\udce4del.png, größer"


def test_a_receiver_whom_the_server_refuses_is_told_in_a_warning_and_the_others_get_the_mail(free_port, caplog):
    class Handler:
        received: list[list[str]] = []  # noqa: RUF012

        async def handle_RCPT(self, server, session, envelope, address, options):
            if address.startswith("typo"):
                return "550 5.1.1 no such user here"
            envelope.rcpt_tos.append(address)
            return "250 OK"

        async def handle_DATA(self, server, session, envelope):
            self.received.append(envelope.rcpt_tos)
            return "250 OK"

    port = free_port()
    server = Controller(Handler(), "127.0.0.1", port)
    server.start()
    try:
        url = f"smtp://127.0.0.1:{port}"
        SmtpNotifier(url, SENDER, "ann@example.org, typo@example.org").send("Retrained", "b")
        (warning,) = caplog.records
        assert warning.levelname == "WARNING"
        for part in ("'Retrained'", "typo@example.org", "550 5.1.1 no such user here", "NEUROLOOP_NOTIFY_TO"):
            assert part in warning.getMessage()
        assert "ann@" not in warning.getMessage()
        assert Handler.received == [["ann@example.org"]]
        with pytest.raises(Unavailable, match="no such user here"):
            SmtpNotifier(url, SENDER, "typo@example.org").send("Retrained", "b")
    finally:
        server.stop()


def test_a_server_that_is_down_is_unavailable_and_the_password_stays_secret(free_port):
    with pytest.raises(Unavailable, match="NEUROLOOP_NOTIFY_URL") as caught:
        SmtpNotifier(f"smtp://ann:hunter2@127.0.0.1:{free_port()}", SENDER, RECEIVERS).send("s", "b")
    assert "hunter2" not in str(caught.value)


def test_a_plain_server_behind_smtps_is_unavailable(smtp_sink):
    with pytest.raises(Unavailable):
        SmtpNotifier(smtp_sink.url.replace("smtp://", "smtps://"), SENDER, RECEIVERS).send("s", "b")


@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")
def test_user_and_password_are_sent_decoded_and_a_wrong_one_is_unavailable(free_port):
    class Handler:
        received: list[bytes] = []  # noqa: RUF012

        async def handle_DATA(self, server, session, envelope):
            self.received.append(envelope.content)
            return "250 OK"

    def authenticate(server, session, envelope, mechanism, data):
        return AuthResult(success=(data.login, data.password) == (b"ann", b"p@ss:word"), handled=False)

    port = free_port()
    server = Controller(
        Handler(), "127.0.0.1", port, auth_required=True, auth_require_tls=False, authenticator=authenticate
    )
    server.start()
    try:
        SmtpNotifier(f"smtp://ann:p%40ss%3Aword@127.0.0.1:{port}", SENDER, RECEIVERS).send("s", "b")
        assert parse_mail(Handler.received[0]).subject == "s"
        with pytest.raises(Unavailable, match="535"):
            SmtpNotifier(f"smtp://ann:wrong@127.0.0.1:{port}", SENDER, RECEIVERS).send("s", "b")
        assert len(Handler.received) == 1
    finally:
        server.stop()


def test_the_sink_refuses_a_mail_that_is_too_large(smtp_sink):
    with pytest.raises(Unavailable, match="552"):
        SmtpNotifier(smtp_sink.url, SENDER, RECEIVERS).send("large", "x" * 2_000_000)
    assert smtp_sink.mails() == []


def test_the_sink_says_so_when_its_store_fails(smtp_sink, tmp_path):
    (tmp_path / "store").write_bytes(b"a file where the store's folder should be")
    with pytest.raises(Unavailable, match="451"):
        SmtpNotifier(smtp_sink.url, SENDER, RECEIVERS).send("s", "b")


def test_a_port_in_use_is_named(store):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(Unavailable, match=f"127.0.0.1:{port}.*NEUROLOOP_MAIL_PORT"):
            start_sink(store, "127.0.0.1", port)


def test_mails_of_others_can_be_read_too():
    html = b"Subject: =?utf-8?q?f=C3=BCr_dich?=\r\nTo: a@b\r\nContent-Type: text/html\r\n\r\n<b>hello</b>\r\n"
    mail = parse_mail(html)
    assert (mail.subject, mail.body.strip(), mail.at.year) == ("für dich", "<b>hello</b>", 1970)
    assert parse_mail(b"").subject == ""
    assert parse_mail(b"Date: not a date\r\nContent-Type: text/plain; charset=nonsense\r\n\r\n\xff\xfe").at.year == 1970


def test_the_sink_process_ends_on_sigterm(tmp_path, free_port):
    port = free_port()
    code = (
        "import sys; from neuroloop.adapters.folder import FolderStore; from neuroloop.adapters.smtp import run_sink\n"
        "run_sink(FolderStore(sys.argv[1]), '127.0.0.1', int(sys.argv[2]))"
    )
    environment = os.environ | {"PYTHONPATH": ":".join(entry for entry in sys.path if entry)}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(port)], env=environment)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                SmtpNotifier(f"smtp://127.0.0.1:{port}", SENDER, RECEIVERS).send("s", "b")
                break
            except Unavailable:
                time.sleep(0.1)
        assert smtplib.SMTP("127.0.0.1", port, "localhost").quit()[0] == 221
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    assert len(list((tmp_path / "mail").iterdir())) == 1

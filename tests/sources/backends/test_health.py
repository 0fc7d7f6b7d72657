"""When a server is left alone, and when it is asked again."""

from fusion_plugins.sources.backends.health import ServerHealth


def test_after_so_many_failures_in_a_row_it_rests_and_an_answer_between_them_starts_the_count_anew():
    health = ServerHealth(rest_after=2, rest_seconds=20.0)
    health.failed(sent=0.0, now=1.0)
    assert health.allows(1.0)
    health.succeeded()
    health.failed(sent=2.0, now=3.0)
    assert health.allows(3.0)
    health.failed(sent=4.0, now=5.0)
    assert not health.allows(24.9)
    assert health.allows(25.0)


def test_requests_that_were_under_way_together_count_as_one_failure():
    health = ServerHealth(rest_after=2, rest_seconds=20.0)
    for now in range(1, 33):
        health.failed(sent=0.0, now=float(now))
    assert health.allows(33.0)
    health.failed(sent=33.0, now=34.0)
    assert not health.allows(35.0)


def test_one_request_tries_it_behind_a_rest_and_its_success_ends_the_rest_at_once():
    health = ServerHealth(rest_after=1, rest_seconds=20.0)
    health.failed(sent=0.0, now=1.0)
    health.sent(21.0)
    assert not health.allows(22.0)
    health.succeeded()
    assert health.allows(22.0)
    health.sent(22.0)
    assert health.allows(22.0)


def test_it_rests_again_when_the_one_that_tried_fails():
    health = ServerHealth(rest_after=1, rest_seconds=20.0)
    health.failed(sent=0.0, now=1.0)
    health.sent(21.0)
    health.failed(sent=21.0, now=30.0)
    assert not health.allows(49.0)
    assert health.allows(50.0)

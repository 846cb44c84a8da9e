"""What the providers file says about limits, and how a policy answers."""

from pathlib import Path

import pytest

from keepstream_worker.limits import Limits, Policy, TenantPolicy
from keepstream_worker.providers.config import ProviderConfigError, load_policy, parse, parse_policy

URL = 'base_url = "http://h"\n'


def complaint(toml: str) -> str:
    with pytest.raises(ProviderConfigError) as caught:
        parse_policy(toml, {}, file="providers.toml")
    return str(caught.value)


def test_without_a_file_nothing_is_limited() -> None:
    policy = load_policy(None, {})
    assert policy.limits_of("default", "m") == []
    assert policy.limits_of("nobody", "m") == []
    assert policy.tenant("shop") == TenantPolicy(concurrency=None, weight=1.0)
    assert (policy.bulk_share, policy.credit) == (0.05, 100_000)
    assert (policy.max_cooldown("x"), policy.broken_after("x"), policy.broken_for("x")) == (10.0, 5, 10.0)


def test_a_policy_of_its_own_needs_no_file() -> None:
    assert Policy().limits_of("x", "m") == []
    assert Policy().tenant("t") == TenantPolicy()


def test_a_provider_and_its_models_are_limited_each_by_itself() -> None:
    policy = parse_policy(
        f"""
        [providers.x]
        {URL}
        concurrency = 200
        requests_per_minute = 600
        models = {{ "gpt-6-*" = {{ concurrency = 20, tokens_per_minute = 1e6 }}, "a/llama" = {{ concurrency = 1 }} }}
        """,
        {},
    )
    of_all = ("x", Limits(concurrency=200, requests_per_minute=600))
    of_family = Limits(concurrency=20, tokens_per_minute=1_000_000)
    assert policy.limits_of("x", "gpt-6-mini") == [of_all, ("x/gpt-6-mini", of_family)]
    assert policy.limits_of("x", "gpt-6-nano") == [of_all, ("x/gpt-6-nano", of_family)]
    assert policy.limits_of("x", "a/llama") == [of_all, ("x/a/llama", Limits(concurrency=1))]
    assert policy.limits_of("x", "gpt-5") == [of_all]


def test_an_exact_name_counts_most_then_the_first_pattern_limit_by_limit() -> None:
    policy = parse_policy(
        f"""
        [providers.x]
        {URL}
        models = {{ "a*" = {{ concurrency = 5, requests_per_minute = 60 }}, "*" = {{ tokens_per_minute = 9000 }}, \
"ab" = {{ concurrency = 7, api = "chat" }} }}
        """,
        {},
    )
    assert policy.limits_of("x", "ab") == [("x/ab", Limits(7, 60, 9000))]
    assert policy.limits_of("x", "ac") == [("x/ac", Limits(5, 60, 9000))]
    assert policy.limits_of("x", "b") == [("x/b", Limits(None, None, 9000))]


def test_tenants_and_the_division_are_read() -> None:
    policy = parse_policy(
        """
        [tenants.shop]
        concurrency = 10
        weight = 4
        [tenants.lab]
        weight = 0.5
        [tenants."*"]
        concurrency = 3
        [scheduling]
        bulk_share = 0.2
        credit = 5000
        """,
        {},
    )
    assert policy.tenant("shop") == TenantPolicy(10, 4.0)
    assert policy.tenant("lab") == TenantPolicy(None, 0.5)  # a table of its own replaces the one for all others
    assert policy.tenant("anyone") == TenantPolicy(3, 1.0)
    assert (policy.bulk_share, policy.credit) == (0.2, 5000)


def test_a_providers_patience_is_read() -> None:
    policy = parse_policy(f"[providers.x]\n{URL}max_cooldown = 0\nbroken_after = 2\nbroken_for = 30\n", {})
    assert (policy.max_cooldown("x"), policy.broken_after("x"), policy.broken_for("x")) == (0.0, 2, 30.0)
    assert policy.broken_after("default") == 5


def test_the_default_provider_is_limited_without_saying_again_how_it_is_reached() -> None:
    environment = {"OPENAI_API_KEY": "sk-1", "OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_ORG_ID": "org-1"}
    toml = '[providers.default]\nconcurrency = 9\nheaders = { "X-A" = "b" }'
    configuration = parse(toml, environment)
    provider = configuration.providers["default"]
    assert provider.url == "http://127.0.0.1:9/v1"
    assert not provider.key_missing
    headers = {name: value.get_secret_value() for name, value in provider.headers.items()}
    assert headers == {"OpenAI-Organization": "org-1", "X-A": "b"}
    assert configuration.policy.limits_of("default", "m") == [("default", Limits(concurrency=9))]


def test_a_default_provider_that_is_reached_elsewhere_gets_nothing_of_the_environments() -> None:
    toml = '[providers.default]\nbase_url = "http://h"\nconcurrency = 9'
    provider = parse(toml, {"OPENAI_API_KEY": "sk-1", "OPENAI_ORG_ID": "org-1"}).providers["default"]
    assert provider.api_key is None
    assert provider.headers == {}


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (
            "[providers.x]\nconcurrency = 0",
            "[providers.x] concurrency: must be greater than or equal to 1; leave it out for no limit",
        ),
        (
            "[providers.x]\nrequests_per_minute = 0",
            "[providers.x] requests_per_minute: must be greater than 0; leave it out for no limit",
        ),
        (
            "[providers.x]\ntokens_per_minute = -5",
            "[providers.x] tokens_per_minute: must be greater than 0; leave it out for no limit",
        ),
        ("[providers.x]\nconcurrency = true", "[providers.x] concurrency: must be a valid integer"),
        ("[providers.x]\nconcurrency = 1.5", "[providers.x] concurrency: must be a valid integer"),
        ('[providers.x]\nconcurrency = "50"', "[providers.x] concurrency: must be a valid integer"),
        ("[providers.x]\ntokens_per_minute = inf", "[providers.x] tokens_per_minute: must be a finite number"),
        ("[providers.x]\nconcurency = 5", "[providers.x] concurency: unknown key; did you mean 'concurrency'?"),
        (
            "[providers.x]\nrequest_per_minute = 5",
            "[providers.x] request_per_minute: unknown key; did you mean 'requests_per_minute'?",
        ),
        ("[providers.x]\nbroken_after = 0", "[providers.x] broken_after: must be greater than or equal to 1"),
        ("[providers.x]\nbroken_for = 301", "[providers.x] broken_for: must be less than or equal to 300"),
        ("[providers.x]\nmax_cooldown = -1", "[providers.x] max_cooldown: must be greater than or equal to 0"),
        (
            '[providers.x]\nmodels = { "m-*" = { concurrency = 0 } }',
            "[providers.x] models.m-*.concurrency: must be greater than or equal to 1; leave it out for no limit",
        ),
        (
            '[providers.x]\nmodels = { "m-*" = { token_per_minute = 1 } }',
            "[providers.x] models.m-*.token_per_minute: unknown key; did you mean 'tokens_per_minute'?",
        ),
        (
            '[providers.x]\nconcurrency = 10\nmodels = { "m-*" = { concurrency = 20 } }',
            (
                "[providers.x]: models.m-*.concurrency is above the provider's own concurrency, which holds for all "
                "its models together and wins; lower the one or raise the other"
            ),
        ),
        ("[tenants.shop]\nweight = 0", "[tenants.shop] weight: must be greater than or equal to 0.001"),
        (
            "[tenants.shop]\nconcurrency = 0",
            "[tenants.shop] concurrency: must be greater than or equal to 1; leave it out for no limit",
        ),
        ("[tenants.shop]\nwieght = 2", "[tenants.shop] wieght: unknown key; did you mean 'weight'?"),
        (
            '[tenants."shop-*"]\nweight = 2',
            '[tenants."shop-*"]: must be named like a tenant, or "*" for all that have no table',
        ),
        ("tenants = 3", "'tenants' must be tables named [tenants.NAME]"),
        ("[tenants]\nshop = 3", "tenants.shop must be a table [tenants.shop]"),
        ("scheduling = 3", "'scheduling' must be a table [scheduling]"),
        ("[scheduling]\nbulk_share = 1", "[scheduling] bulk_share: must be less than 1"),
        ("[scheduling]\nbulk_share = -0.1", "[scheduling] bulk_share: must be greater than or equal to 0"),
        ("[scheduling]\ncredit = 0", "[scheduling] credit: must be greater than or equal to 1"),
        ("[scheduling]\nbulkshare = 0.1", "[scheduling] bulkshare: unknown key; did you mean 'bulk_share'?"),
    ],
)
def test_what_cannot_work_is_one_line_that_names_file_table_and_key(toml: str, message: str) -> None:
    assert complaint(toml.replace("[providers.x]\n", f"[providers.x]\n{URL}")) == f"providers.toml: {message}"


def test_what_is_hardly_meant_is_told_but_allowed() -> None:
    toml = f'[providers.x]\n{URL}tokens_per_minute = 5000\nmodels = {{ "m-*" = {{ tokens_per_minute = 90 }} }}'
    (doubt,) = parse_policy(toml, {}).doubts()
    assert doubt.startswith("[providers.x] models.m-* tokens_per_minute: 90 is less than one usual request takes")
    assert parse_policy(f"[providers.x]\n{URL}tokens_per_minute = 5000", {}).doubts() == []


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ProviderConfigError, match="cannot be read"):
        load_policy(tmp_path / "none.toml", {})

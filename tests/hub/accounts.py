"""Who is behind a token, and what the token may do: accounts, roles of tokens, organizations."""

from collections.abc import Mapping, Sequence
from typing import Any

from .store import git_oid

Role = str | Sequence[str]  # "read", "write", or the permissions of a fine-grained token
_WRITES = ("admin", "write", "contributor")  # roles in an organization that may write


class Accounts:
    """Tokens, their roles, and who is in which organization.

    Args:
        users: token -> account name.
        roles: token -> "write" (what a token without an entry has), "read", or, for a fine-grained token, its
            permissions on the account's own namespace and organizations, such as `["repo.write"]`.
        orgs: organization -> account -> "admin", "write", "contributor" or "read".
    """

    def __init__(self, users: Mapping[str, str], roles: Mapping[str, Role], orgs: Mapping[str, Mapping[str, str]]):
        self.users, self.roles, self.orgs = dict(users), dict(roles), dict(orgs)

    def known(self, name: str) -> bool:
        return name in self.users.values() or name in self.orgs

    def allows(self, token: str, permission: str) -> bool:
        """Whether a token may be used for writes of this kind at all, whatever its account may do."""
        role = self.roles.get(token, "write")
        return role == "write" if isinstance(role, str) else permission in role

    def may_write(self, user: str | None, namespace: str) -> bool:
        return user is not None and (user == namespace or self.orgs.get(namespace, {}).get(user) in _WRITES)

    def may_read(self, user: str | None, namespace: str) -> bool:
        """Whether the namespace's private repositories are shown to the account."""
        return user is not None and (user == namespace or user in self.orgs.get(namespace, {}))

    def profile(self, token: str, user: str) -> dict[str, Any]:
        """What whoami-v2 answers."""
        role = self.roles.get(token, "write")
        access: dict[str, Any] = {"displayName": "loopback", "role": role if isinstance(role, str) else "fineGrained"}
        orgs = {org: who[user] for org, who in self.orgs.items() if user in who}
        mine = [{"type": "org", **_entity(org), "roleInOrg": place} for org, place in orgs.items()]
        if not isinstance(role, str):
            entities = [{"type": "user", **_entity(user)}, *({"type": "org", **_entity(org["name"])} for org in mine)]
            scoped = [{"entity": entity, "permissions": list(role)} for entity in entities]
            access["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": scoped}
        account = {"type": "user", "id": _entity(user)["_id"], "name": user, "fullname": user, "isPro": False}
        told = [{**org, "id": org["_id"], "fullname": org["name"]} for org in mine]
        return {**account, "orgs": told, "auth": {"type": "access_token", "accessToken": access}}


def _entity(name: str) -> dict[str, str]:
    return {"_id": git_oid("blob", name.encode())[:24], "name": name}

"""The named choices of the library's arguments, apart from torch so that the command line can list them."""

from typing import Literal, get_args


Solver = Literal["pinv", "covariance", "soft"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
EXACT_SOLVERS: tuple[Solver, ...] = ("pinv", "covariance")

RouterName = Literal["random", "hash", "prototype", "prototype_random"]
ROUTERS: tuple[RouterName, ...] = get_args(RouterName)

Tokens = Literal["positions", "last+end", "subject", "end", "subject+end", "last"]
TOKENS: tuple[Tokens, ...] = get_args(Tokens)

Reach = Literal["name", "denoiser"]
REACHES: tuple[Reach, ...] = get_args(Reach)

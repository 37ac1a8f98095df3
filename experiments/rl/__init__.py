"""Multi-task reinforcement learning on Meta-World: soft actor-critic (SAC) whose task losses a method balances."""

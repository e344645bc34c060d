"""Catch: a game of six moves that the Atari scripts learn in minutes on a CPU.

A ball falls straight down a board of 7 rows and 5 columns, a row a move, from a random column of the first row. The
player moves a paddle in the last row: left, not at all or right. An episode is one ball: its last move pays +1 where the
paddle is under the ball and -1 where it is not. Play that does not look at the ball catches a fifth of the balls, a
return of -0.6; the paddle starts in the middle, so that every ball can be caught, a return of 1.

The rules are those of bsuite's Catch (Osband et al., 2020, arXiv:1908.03568), whose board is 10 x 5. A frame is drawn
as the Atari games' are, 84 x 84 grey pixels: cells of 12 x 12, white where the ball and the paddle are.

    PYTHONPATH=tests python algorithms/rem_atari.py --dataset atari/catch --env-id catch:Catch-v0
"""

import gymnasium as gym
import numpy as np

ROWS = 7
COLUMNS = 5
CELL = 12  # pixels; the board is 84 pixels high, and 60 wide in the middle of the frame
MARGIN = 12


class Catch(gym.Env):
    """Observations (84, 84) uint8; actions 0 to 2: left, stay, right."""

    observation_space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.ball_row = 0
        self.ball_column = int(self.np_random.integers(COLUMNS))
        self.paddle = COLUMNS // 2
        return self.frame(), {}

    def step(self, action):
        self.paddle = min(max(self.paddle + int(action) - 1, 0), COLUMNS - 1)
        self.ball_row += 1
        landed = self.ball_row == ROWS - 1
        reward = 0.0
        if landed and self.paddle == self.ball_column:
            reward = 1.0
        elif landed:
            reward = -1.0
        return self.frame(), reward, landed, False, {}

    def frame(self):
        """The board as it is, (84, 84)."""
        pixels = np.zeros((84, 84), np.uint8)
        for row, column in ((self.ball_row, self.ball_column), (ROWS - 1, self.paddle)):
            top = CELL * row
            left = MARGIN + CELL * column
            pixels[top : top + CELL, left : left + CELL] = 255
        return pixels


gym.register("Catch-v0", entry_point="catch:Catch")

-- lease: a worker says that it lives on, and for others that they do not; and hears who lives.
--
-- KEYS[1]  ts:{fleet}:lives, a sorted set: life -> when its lease ends, ms since 1970. Who is not
--          in there is over.
-- ARGV     ms of a lease, life ('' if there is none to renew), the life to begin if that one's
--          lease was lost, the end of the lease as its owner knows it (0 before the first), lives
--          that are over, with all lives under which they went on
-- Reply    {now in ms, the life that has a lease now, {life, score, life, score...}}

local call = redis.call
local key, life, anew = KEYS[1], ARGV[2], ARGV[3]
local lease, last = tonumber(ARGV[1]), tonumber(ARGV[4])
local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local ended = redis.pcall('ZREMRANGEBYSCORE', key, '-inf', now)
if type(ended) == 'table' then
  if not ended.err:find('WRONGTYPE', 1, true) then return ended end
  call('DEL', key)
end

if #ARGV > 4 then
  local over = {}
  for i = 5, #ARGV do over[ARGV[i]] = true end
  for _, one in ipairs(call('ZRANGE', key, 0, -1)) do
    if over[one] or over[one:match('^[^+]*')] then call('ZREM', key, one) end
  end
end

if life ~= '' then
  local held = call('ZSCORE', key, life)
  -- Less than its owner has been told of: Redis has lost writes, maybe others, too.
  local whole = held and tonumber(held) >= last
  if not whole and (held or last > 0) then
    -- To take it up again would be to dispute with those who have seen that it was over.
    call('ZREM', key, life)
    life = anew
  end
  call('ZADD', key, now + lease, life)
end

-- The clock was set back: nobody can have so long a lease. Who lives will renew it.
for _, far in ipairs(call('ZRANGEBYSCORE', key, now + 2 * lease, '+inf')) do
  call('ZADD', key, now + lease, far)
end
call('PEXPIRE', key, lease)
return { now, life, call('ZRANGE', key, 0, -1, 'WITHSCORES') }

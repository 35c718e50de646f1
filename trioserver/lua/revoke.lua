-- Revokes tokens: one by its jti, or those of one user or of everybody that were issued before a
-- moment. One atomic step. This file is a script of its own, without lib.lua.
--
-- KEYS[1] is ts:{revoked}:seq; the other keys are made from it. ARGV is name, value, name, value...
--   token    jti of the token; 1 to 256 bytes
--   user     id of the user; 1 to 128 bytes
--   all      1: everybody. One of these three
--   before   not with token: issued in this second or earlier, as the tokens' iat says
--   ago      instead of before: so many seconds before our clock; 0, if neither is given
--   leeway   with ago: seconds that the clock behind iat may be ahead of ours; 2, if not given
--   until    when the revocation lapses; in 30 days, if not given
--   channel  where workers hear of it; CHANNEL_PREFIX .. 'revoked', which is what is not given
--   max      most revocations; 100000, if not given
-- Moments are whole seconds since 1970. The reply is {name, before, until, number of revocations,
-- 1 or, if all of it was known, 0}.
--
-- Keys (in one slot of a cluster)
--   ts:{revoked}:seq      the newest number. Numbers are microseconds, so that after a failover to
--                         a replica that lacks the latest no number means something else
--   ts:{revoked}:entries  hash: name -> '<before> <until>'; names are t:<jti>, u:<user> and all
--   ts:{revoked}:order    sorted set: name by number, to read what is new
--   ts:{revoked}:ends     sorted set: name by when it lapses
--
-- Revocations of the same name are joined: the later of both moments counts. So nothing is ever
-- taken back, and whoever hears of them in another order, or twice, knows the same.

local call = redis.call

local function refuse(problem)
  return redis.error_reply('BADREQUEST ' .. problem)
end

local base = string.match(KEYS[1] or '', '^(ts:{revoked}:)seq$')
if not base then return refuse('the key is ts:{revoked}:seq') end
local SEQ, ENTRIES, ORDER, ENDS = KEYS[1], base .. 'entries', base .. 'order', base .. 'ends'
for key, kind in pairs({[SEQ] = 'string', [ENTRIES] = 'hash', [ORDER] = 'zset', [ENDS] = 'zset'}) do
  local found = call('TYPE', key).ok
  if found ~= kind and found ~= 'none' then
    return redis.error_reply('WRONGTYPE ' .. key .. ' is something else; delete it')
  end
end

local known = {token = 1, user = 1, all = 1, before = 1, ago = 1, leeway = 1, ['until'] = 1, channel = 1, max = 1}
local given = {}
for i = 1, #ARGV, 2 do
  if not known[ARGV[i]] then return refuse('unknown argument') end
  if not ARGV[i + 1] or ARGV[i + 1] == '' then return refuse(ARGV[i] .. ' has no value') end
  given[ARGV[i]] = ARGV[i + 1]
end
local whom = (given.token and 1 or 0) + (given.user and 1 or 0) + (given.all and 1 or 0)
if whom ~= 1 then return refuse('say one of token, user and all') end
if #(given.token or '') > 256 then return refuse('a jti has 1 to 256 bytes') end
if #(given.user or '') > 128 then return refuse('a user has 1 to 128 bytes') end
if given.all and given.all ~= '1' then return refuse('all is 1') end
for _, name in ipairs({'before', 'ago', 'leeway', 'until', 'max'}) do
  local value = given[name]
  if value and not (#value <= 11 and string.find(value, '^%d+$')) then
    return refuse(name .. ' is a whole number of at most 11 digits')
  end
end

local clock = call('TIME')
local now = tonumber(clock[1])
local before = tonumber(given.before)
if before and before > now + 300 then return refuse('before is in the future') end
for _, name in ipairs({'before', 'ago', 'leeway'}) do
  if given.token and given[name] then return refuse(name .. ' does not go with token') end
  if before and name ~= 'before' and given[name] then
    return refuse(name .. ' does not go with before')
  end
end
if given.token then before = 0 end
if not before then
  -- A token that was issued just now may say so.
  local leeway = tonumber(given.leeway or 2)
  if leeway > 3600 then return refuse('leeway is at most 3600') end
  before = math.max(0, now - tonumber(given.ago or 0) + leeway)
end
local lapses = tonumber(given['until'] or now + 2592000)
if lapses <= now then return refuse('until is over') end
if lapses > now + 3155760000 then return refuse('until is more than 100 years away') end

local function text(number) return string.format('%.0f', number) end

-- What has lapsed goes. In portions: all of it may have been revoked at once.
local over = call('ZRANGEBYSCORE', ENDS, '-inf', now, 'LIMIT', 0, 1000)
if #over > 0 then
  call('ZREM', ENDS, unpack(over))
  call('ZREM', ORDER, unpack(over))
  call('HDEL', ENTRIES, unpack(over))
end

local name = given.token and 't:' .. given.token or given.user and 'u:' .. given.user or 'all'
local old = call('HGET', ENTRIES, name) or ''
local old_before, old_lapses = string.match(old, '^(%d+) (%d+)$')
local whole = old_before and #old_before <= 11 and #old_lapses <= 11
if whole and call('ZSCORE', ENDS, name) and call('ZSCORE', ORDER, name) then
  if tonumber(old_before) >= before and tonumber(old_lapses) >= lapses then
    return {name, tonumber(old_before), tonumber(old_lapses), call('ZCARD', ENDS), 0}
  end
  before = math.max(before, tonumber(old_before))
  lapses = math.max(lapses, tonumber(old_lapses))
elseif call('ZCARD', ENDS) >= tonumber(given.max or 100000) then
  return redis.error_reply('FULL there are ' .. call('ZCARD', ENDS) .. ' revocations already')
end

local newest = tonumber(call('GET', SEQ) or 0) or 0
if not (newest >= 0 and newest < 2 ^ 53 - 1) then newest = 0 end
local seq = text(math.max(newest + 1, now * 1000000 + clock[2]))
call('HSET', ENTRIES, name, text(before) .. ' ' .. text(lapses))
call('ZADD', ENDS, text(lapses), name)
call('ZADD', ORDER, seq, name)
call('SET', SEQ, seq)
local last = math.min(tonumber(call('ZREVRANGE', ENDS, 0, 0, 'WITHSCORES')[2]), now + 3155760000)
for _, key in ipairs({SEQ, ENTRIES, ORDER, ENDS}) do call('EXPIREAT', key, text(last)) end
call('PUBLISH', given.channel or 'revoked', seq)
return {name, before, lapses, call('ZCARD', ENDS), 1}

-- chat_commit: holders of chat sessions say how many messages have been counted.
--
-- KEYS     ts:session:{<session>} of each; see chat_attach.lua
-- ARGV     moment by this Redis's clock after which all of it is void (ms; 0: never), ms they live,
--          then for each session: holder, its turn, version, count, owner ('' if it has none that
--          is known), ids ('' if there are none), '1' if the holder leaves it
-- Reply    {moment of now, number of a session, what is wrong with it, number, what...}, from 1;
--          {moment of now, 'late'} if nothing was done
--
-- All is absolute, so to say it again is harmless, and so is what comes late: an older version is
-- passed over. After its moment everything is: nobody waits for it any more, and clients have been
-- told that their messages are not counted. A session that is not there any more, or is older than
-- its holder, is as the holder says: Redis has lost what it knew.

local call = redis.call
local FIELDS, PAST = 7, 4
local EMPTY = 60000 -- ms that an anonymous session lives on in which nothing was counted

local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
if tonumber(ARGV[1]) > 0 and now > tonumber(ARGV[1]) then return { now, 'late' } end
local lasts = ARGV[2]
local answer = { now }

-- Whoever leaves is written down, or a late duplicate of his coming would take it once more.
local function past(key, holder)
  local kept = { holder }
  for one in (call('HGET', key, 'p') or ''):gmatch('%S+') do
    if #kept < PAST and one ~= holder then kept[#kept + 1] = one end
  end
  return table.concat(kept, ' ')
end

for at, key in ipairs(KEYS) do
  local from = 2 + (at - 1) * FIELDS
  local holder, turn, version = ARGV[from + 1], ARGV[from + 2], ARGV[from + 3]
  local count, owner, ids = ARGV[from + 4], ARGV[from + 5], ARGV[from + 6]
  local leaves = ARGV[from + 7] == '1'
  local known = redis.pcall('HMGET', key, 'h', 't', 'v', 'o')
  if known.err then
    if not known.err:find('WRONGTYPE', 1, true) then return known end
    call('DEL', key)
    known = {}
  end
  local stored, mine = tonumber(known[2]) or -1, tonumber(turn)
  local theirs = known[4] or ''
  if stored > mine or (stored == mine and known[1] ~= holder) then
    answer[#answer + 1] = at
    answer[#answer + 1] = 'superseded'
  elseif theirs ~= '' and owner ~= '' and theirs ~= owner then
    answer[#answer + 1] = at
    answer[#answer + 1] = 'forbidden'
  elseif stored < mine or tonumber(version) > (tonumber(known[3]) or 0) then
    call('HSET', key, 'n', count, 'v', version)
    if stored < mine or leaves then
      call('HSET', key, 'h', leaves and '' or holder, 't', turn)
    end
    if leaves then call('HSET', key, 'p', past(key, holder)) end
    if owner ~= theirs and owner ~= '' or not known[4] then call('HSET', key, 'o', owner) end
    if ids ~= '' then call('HSET', key, 'i', ids) end
    -- Nobody can miss it, and whoever connects makes one: they would fill Redis for their whole life.
    local empty = leaves and count == '0' and owner == '' and theirs == ''
    call('PEXPIRE', key, empty and math.min(tonumber(lasts), EMPTY) or lasts)
  end
end
return answer
